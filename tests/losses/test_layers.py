"""The trainable parts of losses, and those losses, against loops in float64 written from the papers."""

import math

import numpy as np
import pytest
import torch
from conftest import EPS
from torch.nn import functional as F

from indistill import config, losses
from indistill.losses import Shape
from indistill.losses.common import same_size
from indistill.losses.crd_loss import Contrast
from indistill.losses.objective import create_layers
from indistill.losses.reviewkd_loss import Review
from indistill.models.outputs import Output, Targets

pytestmark = pytest.mark.portable

SHAPE = Shape(student_widths=[3, 6], teacher_widths=[5, 4], student_dim=7, teacher_dim=9)
# (student, teacher) height and width of the shallow and of the deep pair
SIZES = {
    "equal": [((8, 8), (8, 8)), ((4, 4), (4, 4))],
    "teacher larger": [((7, 7), (14, 14)), ((4, 4), (7, 7))],
    "student larger": [((14, 14), (7, 7)), ((7, 7), (4, 4))],
    "no multiple": [((5, 5), (7, 7)), ((3, 3), (2, 2))],
    "not square": [((6, 9), (12, 5)), ((2, 3), (5, 4))],
}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def batch(sizes=SIZES["teacher larger"], samples=6, dtype=torch.float32):
    """What student and teacher give on a batch; the student's part wants gradients."""
    student = [random(samples, c, *s, seed=1, dtype=dtype) for c, (s, _) in zip(SHAPE.student_widths, sizes)]
    teacher = [random(samples, c, *t, seed=2, dtype=dtype) for c, (_, t) in zip(SHAPE.teacher_widths, sizes)]
    embeddings = [random(samples, d, seed=3, dtype=dtype) for d in (SHAPE.student_dim, SHAPE.teacher_dim)]
    output = Output(tuple(x.requires_grad_() for x in student), embeddings[0].requires_grad_())
    return output, Targets(tuple(teacher), embeddings[1])


def loss_of(name, projected, targets):
    """As the objective puts them together."""
    match name:
        case "hint":
            return sum(losses.hint(*same_size(s, t)) for s, t in zip(projected, targets.features))
        case "vid":
            return sum(
                losses.vid(m, v, t) for m, v, t in zip(projected[::2], projected[1::2], targets.features)
            )
        case "reviewkd":
            return sum(losses.reviewkd(f, t) for f, t in zip(projected, targets.features))
        case "crd":
            return losses.crd(*projected)


def make(name, seed=0):
    torch.manual_seed(seed)
    keys = {"dim": 11} if name == "crd" else {}
    return config.KD(losses=[{"name": name, **keys}]).losses[0].layers(SHAPE)


NAMES = ["hint", "vid", "reviewkd", "crd"]


# --- the losses ---------------------------------------------------------------------------------------------


def pooled(x, height, width):
    """Adaptive average pooling of [B, C, H, W]: output i covers inputs floor(iH/h) to ceil((i+1)H/h)."""
    rows, columns = x.shape[2:]
    out = np.zeros((*x.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            top, bottom = i * rows // height, math.ceil((i + 1) * rows / height)
            left, right = j * columns // width, math.ceil((j + 1) * columns / width)
            out[:, :, i, j] = x[:, :, top:bottom, left:right].mean(axis=(2, 3))
    return out


@pytest.mark.parametrize("teacher_size", [(3, 4), (7, 6)])
def test_vid_matches_the_formula(teacher_size):
    mean, variance, teacher = (
        random(2, 3, 3, 4),
        random(1, 3, 1, 1).exp(),
        random(2, 3, *teacher_size, seed=1),
    )
    target, total = pooled(teacher.numpy(), 3, 4), 0.0
    for index in np.ndindex(2, 3, 3, 4):
        v = variance[0, index[1], 0, 0].item()
        density = math.exp(-((target[index] - mean[index].item()) ** 2) / (2 * v)) / math.sqrt(
            2 * math.pi * v
        )
        total -= math.log(density) + math.log(2 * math.pi) / 2
    assert losses.vid(mean, variance, teacher).item() == pytest.approx(total / 72, rel=1e-10)


def test_vid_is_least_at_the_true_mean_and_variance():
    teacher = 3 + 2 * random(4, 1, 5, 5)
    mean = teacher.mean().expand_as(teacher).clone().requires_grad_()
    variance = teacher.var(correction=0).view(1, 1, 1, 1).clone().requires_grad_()
    losses.vid(mean, variance, teacher).backward()
    assert mean.grad.sum().item() == pytest.approx(0, abs=1e-12)
    assert variance.grad.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("size", "weights"),
    [
        ((7, 7), {4: 0.5, 2: 0.25, 1: 0.125}),
        ((5, 9), {4: 0.5, 2: 0.25, 1: 0.125}),
        ((4, 4), {2: 0.5, 1: 0.25}),
        ((2, 2), {1: 0.5}),
        ((6, 2), {1: 0.5}),
        ((1, 1), {}),
    ],
)
def test_reviewkd_matches_the_formula(size, weights):
    fused, teacher = random(2, 3, *size), random(2, 3, *size, seed=1)
    total = ((fused - teacher).numpy() ** 2).mean()
    for level, weight in weights.items():
        difference = pooled(fused.numpy(), level, level) - pooled(teacher.numpy(), level, level)
        total += weight * (difference**2).mean()
    expected = total / (1 + sum(weights.values()))
    assert losses.reviewkd(fused, teacher).item() == pytest.approx(expected, rel=1e-12)


def crd_in_loops(student, teacher, temperature, labels):
    """Equation 18 with h = e^x / (e^x + N), anchors on both sides."""
    size, total = len(student), 0.0
    for anchors, candidates in ((teacher, student), (student, teacher)):
        for i in range(size):
            others = [j for j in range(size) if labels[j] != labels[i]]
            if not others:
                continue  # h = 1, of which the logarithm is 0
            h = {}
            for j in [i, *others]:
                e = math.exp(sum(a * b for a, b in zip(anchors[i], candidates[j])) / temperature)
                h[j] = e / (e + len(others))
            total -= math.log(h[i]) + sum(math.log(1 - h[j]) for j in others)
    return total / size


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 0, 0, 1], [0, 0, 0, 0, 0, 4], [3, 3, 3, 3, 3, 3]])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_crd_matches_the_formula(labels, temperature):
    student, teacher = F.normalize(random(6, 4), dim=1), F.normalize(random(6, 4, seed=1), dim=1)
    expected = crd_in_loops(student.tolist(), teacher.tolist(), temperature, labels or range(6))
    labels = labels and torch.tensor(labels)
    assert losses.crd(student, teacher, temperature, labels).item() == pytest.approx(
        expected, rel=1e-9, abs=1e-12
    )
    single = losses.crd(student.float(), teacher.float(), temperature, labels)
    # A mean over 6 samples of 2 * 6 terms; each changes no faster than its score, of 4 products over the
    # temperature.
    assert single.item() == pytest.approx(expected, rel=12 * EPS, abs=12 * 4 * EPS / temperature)
    if temperature == 0.07:
        assert torch.equal(single, losses.crd(student.float(), teacher.float(), labels=labels))


@pytest.mark.parametrize("samples", [1, 4])
def test_crd_without_negatives_asks_for_nothing(samples):
    student, teacher = (
        F.normalize(random(samples, 3), dim=1).requires_grad_(),
        F.normalize(random(samples, 3), dim=1),
    )
    loss = losses.crd(student, teacher, labels=torch.zeros(samples, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_crd_is_finite_where_exponentials_are_not():
    teacher = torch.eye(4)
    student = (-teacher).requires_grad_()  # each pair as far apart as can be, e^-1000 over e^0
    loss = losses.crd(student, teacher, temperature=1e-3)
    loss.backward()
    assert loss.item() == pytest.approx(2 * (1000 + math.log(3) + 3 * math.log(4 / 3)), rel=8 * EPS)
    assert student.grad.isfinite().all()


def test_crd_makes_pairs_recognisable():
    # Equation 19 without the normalisation of the authors' code falls too, but to where all samples look the
    # same.
    torch.manual_seed(0)
    teacher = random(32, SHAPE.teacher_dim, dtype=torch.float32)
    student = torch.randn(32, SHAPE.student_dim, requires_grad=True)
    part = Contrast(SHAPE)
    optimizer = torch.optim.SGD([student, *part.parameters()], lr=0.05, momentum=0.9)
    for _ in range(150):
        s, t = part(Output((), student), Targets((), teacher))
        optimizer.zero_grad()
        losses.crd(s, t).backward()
        optimizer.step()
    assert torch.equal((s @ t.T).argmax(dim=1), torch.arange(32))


CASES = {
    losses.vid: [random(2, 2, 2, 3), random(1, 2, 1, 1).exp(), random(2, 2, 3, 3, seed=1)],
    losses.reviewkd: [random(2, 2, 3, 5), random(2, 2, 3, 5, seed=1)],
    losses.crd: [random(4, 3), random(4, 3, seed=1)],
}


@pytest.mark.parametrize("loss", CASES)
def test_gradients(loss):
    assert torch.autograd.gradcheck(loss, [x.clone().requires_grad_() for x in CASES[loss]])


def test_gradients_of_crd_with_labels():
    labels = torch.tensor([0, 1, 0, 0])
    inputs = [x.clone().requires_grad_() for x in CASES[losses.crd]]
    assert torch.autograd.gradcheck(lambda s, t: losses.crd(s, t, 0.3, labels), inputs)


@pytest.mark.parametrize("loss", CASES)
def test_half_precision_is_computed_in_single_and_autocast_changes_nothing(loss):
    halves = [x.bfloat16() for x in CASES[loss]]
    expected = loss(*(x.float() for x in halves))
    assert torch.equal(loss(*halves), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(*(x.float() for x in halves)), expected)


@pytest.mark.parametrize(
    ("loss", "shapes"),
    [
        (losses.vid, [(2, 3, 4, 4), (1, 3, 1, 1), (2, 1, 4, 4)]),
        (losses.vid, [(2, 3, 4, 4), (1, 3, 1, 1), (2, 3, 8, 2)]),
        (losses.reviewkd, [(2, 3, 4, 4), (2, 3, 4, 1)]),
        (losses.crd, [(4, 3), (1, 3)]),
    ],
)
def test_shapes_are_not_broadcast(loss, shapes):
    with pytest.raises(ValueError, match=rf"losses.{loss.__name__}: \w+ \({shapes[0][0]}, {shapes[0][1]}"):
        loss(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("shape", [(3,), (4, 10)])
def test_crd_wants_one_class_per_sample(shape):
    with pytest.raises(ValueError, match=r"labels .* of 4 samples: need one class for each"):
        losses.crd(torch.zeros(4, 3), torch.zeros(4, 3), labels=torch.zeros(shape, dtype=torch.int64))


# --- the projectors -----------------------------------------------------------------------------------------


def test_create_makes_one_for_each_loss_that_has_one():
    names = ["ce", "crd", "hint", "kd", "vid", "reviewkd", "hint"]
    sections = [{"name": name, "dim": 11} if name == "crd" else {"name": name} for name in names]
    parts = create_layers([(loss, SHAPE) for loss in config.KD(losses=sections).losses])
    assert {key: type(part).__name__ for key, part in parts.items()} == {
        "1": "Contrast",
        "2": "Hint",
        "4": "Variational",
        "5": "Review",
        "6": "Hint",
    }
    output, targets = batch()
    assert [tuple(x.shape) for x in parts["1"](output, targets)] == [(6, 11), (6, 11)]


def weights_of(*modules):
    return [module.weight.detach().numpy() for module in modules]


def test_hint_is_a_linear_map_of_every_pixel():
    part, (output, targets) = make("hint").double(), batch(SIZES["no multiple"], dtype=torch.float64)
    for regressor, student, adapted in zip(part.regressors, output.features, part(output, targets)):
        (weight,) = weights_of(regressor)  # [C_t, C_s, 1, 1]
        expected = np.einsum("tc,bchw->bthw", weight[:, :, 0, 0], student.detach().numpy())
        expected += regressor.bias.detach().numpy()[:, None, None]
        np.testing.assert_allclose(adapted.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_vid_predicts_from_the_pooled_map(sizes):
    part, (output, targets) = make("vid").double(), batch(sizes, dtype=torch.float64)
    projected = part(output, targets)
    for i, (student, teacher) in enumerate(zip(output.features, targets.features)):
        x = pooled(
            student.detach().numpy(), *(min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:]))
        )
        first, second, third = (w[:, :, 0, 0] for w in weights_of(*part.regressors[i][::2]))
        x = np.maximum(np.einsum("oc,bchw->bohw", first, x), 0)
        x = np.maximum(np.einsum("oc,bchw->bohw", second, x), 0)
        expected = np.einsum("oc,bchw->bohw", third, x)
        np.testing.assert_allclose(projected[2 * i].detach().numpy(), expected, rtol=1e-10, atol=1e-12)


def test_vid_starts_from_the_published_variance_and_keeps_it_positive():
    part, (output, targets) = make("vid"), batch()
    variances = part(output, targets)[1::2]
    assert [tuple(v.shape) for v in variances] == [(1, 5, 1, 1), (1, 4, 1, 1)]
    assert all(torch.allclose(v, torch.tensor(5.0), rtol=4 * EPS, atol=0) for v in variances)
    with torch.no_grad():
        part.raw_variances[0].fill_(-1000)
        assert torch.equal(part(output, targets)[1], torch.full((1, 5, 1, 1), 1e-5))


def review_in_loops(part, output, targets):
    """Algorithm of 2104.09044, figure 3, in eval mode: batch norm is an affine map of each channel."""

    def normalised(x, norm):
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
        shift = norm.bias.detach().numpy() - norm.running_mean.numpy() * scale
        return x * scale[:, None, None] + shift[:, None, None]

    def nearest(x, height, width):
        rows = [i * x.shape[2] // height for i in range(height)]
        columns = [j * x.shape[3] // width for j in range(width)]
        return x[:, :, rows][:, :, :, columns]

    def convolved(x, weight):  # 3x3, padded with a zero on each side
        height, width = x.shape[2:]
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        shifted = [(i, j, padded[:, :, i : i + height, j : j + width]) for i in range(3) for j in range(3)]
        return sum(np.einsum("oc,bchw->bohw", weight[:, :, i, j], window) for i, j, window in shifted)

    fused, review = {}, None
    for i in reversed(range(len(output.features))):
        fusion, x = part.fusions[i], output.features[i].detach().numpy()
        (weight,) = weights_of(fusion.reduce[0])
        x = normalised(np.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x), fusion.reduce[1])
        if review is not None:
            review = nearest(review, *x.shape[2:])
            (weight,) = weights_of(fusion.attention)
            gates = np.einsum("oc,bchw->bohw", weight[:, :, 0, 0], np.concatenate([x, review], axis=1))
            gates = 1 / (1 + np.exp(-gates - fusion.attention.bias.detach().numpy()[:, None, None]))
            x = x * gates[:, [0]] + review * gates[:, [1]]
        review = nearest(x, *targets.features[i].shape[2:])
        (weight,) = weights_of(fusion.expand[0])
        fused[i] = normalised(convolved(review, weight), fusion.expand[1])
    return [fused[i] for i in sorted(fused)]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_review_fuses_from_deep_to_shallow(sizes):
    part, (output, targets) = make("reviewkd").double(), batch(sizes, dtype=torch.float64)
    part(output, targets)  # statistics other than 0 and 1
    part.eval()
    fused = part(output, targets)
    assert [x.shape for x in fused] == [x.shape for x in targets.features]
    for result, expected in zip(fused, review_in_loops(part, output, targets)):
        np.testing.assert_allclose(result.detach().numpy(), expected, rtol=1e-9, atol=1e-10)


def test_review_is_as_wide_as_the_deepest_student_map_and_no_wider_than_512():
    shape = Shape([8, 1024], [16, 2048], 1024, 2048)
    assert [fusion.reduce[0].out_channels for fusion in Review(shape).fusions] == [512, 512]
    assert [fusion.reduce[0].out_channels for fusion in Review(SHAPE).fusions] == [6, 6]


def test_review_of_a_single_pair_has_nothing_to_fuse():
    part = Review(Shape([3], [5], 7, 9))
    output, targets = batch()
    (fused,) = part(output, targets)
    assert fused.shape == targets.features[0].shape
    assert all(fusion.attention is None for fusion in part.fusions)


def test_contrast_puts_both_on_the_unit_sphere():
    part, (output, targets) = make("crd").double(), batch(dtype=torch.float64)
    for layer, x, unit in zip(
        (part.student, part.teacher), (output.embedding, targets.embedding), part(output, targets)
    ):
        (weight,) = weights_of(layer)
        expected = x.detach().numpy() @ weight.T + layer.bias.detach().numpy()
        expected /= np.sqrt((expected**2).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(unit.detach().numpy(), expected, rtol=1e-10)


def test_contrast_is_of_unit_length_under_autocast():
    part, (output, targets) = make("crd"), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = part(output, targets)
    for rows in projected:
        assert torch.allclose(rows.norm(dim=1), torch.ones(6), rtol=0, atol=11 * EPS)  # of 11 squares


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_and_the_student_get_a_gradient(name, sizes):
    part, (output, targets) = make(name), batch(sizes)
    loss_of(name, part(output, targets), targets).backward()
    without = [
        key for key, value in part.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0
    ]
    assert not without
    read = [output.embedding] if name == "crd" else output.features
    assert all(x.grad.abs().sum() > 0 for x in read)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_lowers_the_loss(name, sizes):
    part, (output, targets) = make(name), batch(sizes)
    optimizer = torch.optim.SGD([*part.parameters(), *output.features, output.embedding], lr=0.01)
    before = loss_of(name, part(output, targets), targets)
    before.backward()
    optimizer.step()
    assert loss_of(name, part(output, targets), targets) < before


@pytest.mark.parametrize("name", NAMES)
def test_one_sample_in_eval_mode_is_as_in_a_batch(name):
    part, (output, targets) = make(name).double().eval(), batch(dtype=torch.float64)
    alone = part(
        Output(tuple(x[:1] for x in output.features), output.embedding[:1]),
        Targets(tuple(x[:1] for x in targets.features), targets.embedding[:1]),
    )
    for one, all_of_them in zip(alone, part(output, targets)):
        assert torch.allclose(one, all_of_them[:1], rtol=0, atol=1e-10)
