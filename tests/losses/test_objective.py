"""The loss of a batch against its formulas in float64."""

import numpy as np
import pytest
import torch
from conftest import EPS
from torch.nn import functional as F

from indistill import config, losses
from indistill.curriculum import Phase
from indistill.losses.common import same_size
from indistill.losses.objective import Objective, reads, term_names
from indistill.models.outputs import Output, Targets

pytestmark = [pytest.mark.portable, pytest.mark.usefixtures("float64")]

KD = Phase("kd", 3, (), (), 10, None)
FEW = 8 * EPS  # cross-entropy is always float32: a logarithm of a sum of five exponentials, then a mean


def objective(output, targets, labels, phase, losses, step=10):
    return Objective(losses, steps_per_epoch=4)(output, targets, labels=labels, phase=phase, step=step)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def output():
    return Output((), random(6, 12, seed=0).requires_grad_(), random(6, 5, seed=1).requires_grad_())


@pytest.fixture
def targets():
    return Targets((), random(6, 20, seed=2), random(6, 5, seed=3))


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


def cross_entropy(logits, probabilities, smoothing=0.0):
    """-sum of q log p in float64, q mixed with the uniform distribution (Szegedy 2016), batch mean."""
    logits, q = logits.detach().double().numpy(), probabilities.double().numpy()
    q = (1 - smoothing) * q + smoothing / q.shape[1]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return -(q * np.log(p)).sum(axis=1).mean()


def test_kd_phase_sums_weighted_terms(output, targets):
    section = config.KD(
        losses=[
            {"name": "ce", "weight": 0.3},
            {"name": "kd", "weight": 2.0, "temperature": 3.0},
            {"name": "pkt", "weight": 50.0},
        ]
    )
    total, terms = objective(output, targets, LABELS, KD, section.losses)
    expected = {
        "ce": cross_entropy(output.logits, F.one_hot(LABELS, 5)),
        "kd": losses.kd(output.logits, targets.logits, 3.0).item(),
        "pkt": losses.pkt(output.embedding, targets.embedding).item(),
    }
    assert list(terms) == ["ce", "kd", "pkt"]
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=FEW if name == "ce" else 1e-12)
        assert not terms[name].requires_grad
    weighted = 0.3 * expected["ce"] + 2.0 * expected["kd"] + 50.0 * expected["pkt"]
    assert total.item() == pytest.approx(weighted, rel=FEW)
    total.backward()
    assert output.logits.grad.abs().sum() > 0
    assert output.embedding.grad.abs().sum() > 0
    assert targets.logits.grad is None


def test_each_loss_reads_its_own_input(targets):
    section = config.KD(losses=[{"name": "pkt"}])
    output = Output((), random(6, 12, seed=0), None)  # without loss on the logits there are none
    total, terms = objective(output, targets, LABELS, KD, section.losses)
    assert total.item() == terms["pkt"].item() == losses.pkt(output.embedding, targets.embedding).item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_of_labels_and_of_mixed_labels(output, targets, smoothing):
    section = config.KD(losses=[{"name": "ce", "label_smoothing": smoothing}])
    _, terms = objective(output, targets, LABELS, KD, section.losses)
    one_hot = F.one_hot(LABELS, 5).double()
    assert terms["ce"].item() == pytest.approx(cross_entropy(output.logits, one_hot, smoothing), rel=FEW)

    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    _, terms = objective(output, targets, mixed, KD, section.losses)
    assert terms["ce"].item() == pytest.approx(cross_entropy(output.logits, mixed, smoothing), rel=FEW)


def test_cross_entropy_of_half_precision_is_computed_in_full(targets):
    logits = (10 * random(6, 5, seed=1)).bfloat16()
    _, terms = objective(Output((), None, logits), targets, LABELS, KD, config.KD().losses)
    assert terms["ce"].dtype == torch.float32
    assert terms["ce"].item() == pytest.approx(cross_entropy(logits, F.one_hot(LABELS, 5)), rel=FEW)


def test_warmup_phase_is_the_mean_squared_error_of_its_pair():
    student, teacher = random(2, 3, 4, 4, seed=0).requires_grad_(), random(2, 3, 4, 4, seed=1)
    phase = Phase("warmup 2/3", 1, (1,), (1.0,), 0, 4)
    total, terms = objective(Output((student,)), Targets((teacher,)), LABELS, phase, config.KD().losses)
    expected = ((student.detach() - teacher).double() ** 2).mean().item()
    assert list(terms) == ["mse_pair2"]
    assert total.item() == pytest.approx(expected, rel=1e-12)
    total.backward()
    assert torch.allclose(
        student.grad, 2 * (student.detach() - teacher) / student.numel(), rtol=1e-12, atol=0
    )


def test_several_pairs_have_their_weights():
    maps = [(random(2, 3, 4, 4, seed=i), random(2, 3, 4, 4, seed=9 + i)) for i in range(2)]
    phase = Phase("warmup", 0, (0, 2), (0.25, 3.0), 0, 4)
    output, targets = Output(tuple(s for s, _ in maps)), Targets(tuple(t for _, t in maps))
    total, terms = objective(output, targets, LABELS, phase, config.KD().losses)
    errors = [((s - t).double() ** 2).mean().item() for s, t in maps]
    assert list(terms) == ["mse_pair1", "mse_pair3"]
    assert total.item() == pytest.approx(0.25 * errors[0] + 3.0 * errors[1], rel=1e-12)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 4), (8, 8)), ((8, 8), (4, 4)), ((2, 12), (6, 4)), ((7, 7), (14, 14)), ((5, 5), (5, 5))],
)
def test_the_larger_map_is_averaged_to_the_smaller(student, teacher):
    s, t = random(2, 3, *student, seed=0), random(2, 3, *teacher, seed=1)
    size = [min(a, b) for a, b in zip(student, teacher)]

    def mean_of_blocks(x):
        height, width = x.shape[2] // size[0], x.shape[3] // size[1]
        return x.reshape(2, 3, size[0], height, size[1], width).mean(dim=(3, 5))

    for ours, expected in zip(same_size(s, t), (mean_of_blocks(s), mean_of_blocks(t))):
        assert list(ours.shape[2:]) == size
        assert torch.allclose(ours, expected, rtol=0, atol=1e-12)
    phase = Phase("warmup 1/1", 0, (0,), (1.0,), 0, 4)
    total, _ = objective(Output((s,)), Targets((t,)), LABELS, phase, config.KD().losses)
    assert total.item() == pytest.approx(
        (mean_of_blocks(s) - mean_of_blocks(t)).square().mean().item(), rel=1e-12
    )


def test_sizes_that_do_not_divide_are_pooled_over_overlapping_windows():
    teacher = torch.arange(14.0).reshape(1, 1, 1, 14).expand(1, 1, 14, 14)
    _, pooled = same_size(torch.zeros(1, 1, 10, 10), teacher)
    # Window i reads columns floor(14 i / 10) to ceil(14 (i + 1) / 10) - 1.
    windows = [(i * 14 // 10, -(-(i + 1) * 14 // 10)) for i in range(10)]
    assert pooled[0, 0, 0].tolist() == pytest.approx([(a + b - 1) / 2 for a, b in windows])


def test_reads():
    assert reads(config.KD().losses, "logits")
    assert reads(config.KD(losses=[{"name": "pkt"}, {"name": "kd"}]).losses, "logits")
    pkt = config.KD(losses=[{"name": "pkt"}]).losses
    assert not reads(pkt, "logits")
    assert reads(pkt, "embedding")
    assert not reads(pkt, "features")


def test_a_loss_given_twice_is_told_apart(output, targets):
    section = config.KD(
        losses=[{"name": "kd", "temperature": 1.0}, {"name": "ce"}, {"name": "kd", "weight": 2.0}]
    )
    assert term_names(section.losses) == ["kd", "ce", "kd_2"]
    total, terms = objective(output, targets, LABELS, KD, section.losses)
    assert terms["kd"].item() == losses.kd(output.logits, targets.logits, 1.0).item()
    assert terms["kd_2"].item() == losses.kd(output.logits, targets.logits, 4.0).item()
    assert total.item() == pytest.approx((terms["kd"] + terms["ce"] + 2 * terms["kd_2"]).item(), rel=FEW)


@pytest.mark.parametrize(("value", "returned"), [(torch.zeros(6), r"shape \[6\]"), (1.0, "float")])
def test_a_loss_that_returns_no_scalar_is_named(output, targets, value, returned):
    class Wrong(losses.Loss):
        reads = frozenset({"logits"})

        def __call__(self, student, teacher, labels, epoch):
            return value

    with pytest.raises(ValueError, match=f"loss wrong returned {returned}: expected a tensor with one value"):
        objective(output, targets, LABELS, KD, [Wrong(name="wrong")])


@pytest.mark.parametrize(("step", "weight"), [(10, 100.0), (13, 100.0), (14, 70.0), (18, 49.0)])
def test_information_flow_decays_epoch_by_epoch_on_the_pairs_alone(step, weight):
    maps = [(random(6, 2 + i, 3, 3, seed=i), random(6, 4, 2, 2, seed=9 + i)) for i in range(2)]
    output = Output(tuple(s for s, _ in maps), random(6, 12, seed=20))
    targets = Targets(tuple(t for _, t in maps), random(6, 7, seed=21))
    section = config.KD(losses=[{"name": "information_flow"}])
    total, _ = objective(
        output, targets, LABELS, KD, section.losses, step
    )  # the phase begins at 10, an epoch is 4
    pairs = sum(losses.pkt(s.flatten(1), t.flatten(1)) for s, t in maps)
    expected = losses.pkt(output.embedding, targets.embedding) + weight * pairs
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_information_flow_scales_each_of_its_layers_by_the_batch():
    maps = [(random(6, 2, 3, 3, seed=1), random(6, 4, 2, 2, seed=2))]
    output, targets = (
        Output((maps[0][0],), random(6, 12, seed=3)),
        Targets((maps[0][1],), random(6, 7, seed=4)),
    )
    plain, scaled = (
        objective(
            output,
            targets,
            LABELS,
            KD,
            config.KD(losses=[{"name": "information_flow", "scale": scale}]).losses,
        )
        for scale in ("none", "batch")
    )
    assert scaled[0].item() == pytest.approx(6 * plain[0].item(), rel=1e-12)


def test_every_loss_of_the_config_has_its_term():
    """Each with its parameters, on the inputs that it says it reads."""
    maps = [(random(6, 3, 4, 4, seed=i), random(6, 5, 2, 2, seed=9 + i)) for i in range(2)]
    student, teacher = tuple(s for s, _ in maps), tuple(t for _, t in maps)
    logits, embedding = random(6, 5, seed=1), random(6, 12, seed=2)
    targets = Targets(teacher, random(6, 7, seed=3), random(6, 5, seed=4), (random(6, 5, seed=5),))
    cases = [
        ({"name": "kd", "standardize": True}, losses.kd(logits, targets.logits, 4.0, True), 1.0),
        ({"name": "dist", "beta": 2.0}, losses.dist(logits, targets.logits, 2.0, 1.0, 1.0), 1.0),
        ({"name": "dkd", "beta": 0.5}, losses.dkd(logits, targets.logits, LABELS, 1.0, 0.5, 4.0), 1.0),
        (
            {"name": "dih", "weights": [1.0, 0.5]},
            losses.dih(logits, [targets.logits, *targets.cohort], LABELS, 0.1, 5.0, [1.0, 0.5]),
            1.0,
        ),
        ({"name": "token", "mode": "soft"}, losses.token(logits + 1, targets.logits, "soft", 1.0), 1.0),
        ({"name": "pkt", "kernel": "rbf"}, losses.pkt(embedding, targets.embedding, "rbf", "jeffreys"), 1.0),
        ({"name": "pkt", "scale": "batch"}, 6 * losses.pkt(embedding, targets.embedding), 1.0),
        ({"name": "rkd"}, losses.rkd(embedding, targets.embedding, 25.0, 50.0), 1.0),
        ({"name": "sp"}, sum(losses.sp(s, t) for s, t in maps), 3000.0),
        ({"name": "at"}, sum(losses.at(*same_size(s, t)) for s, t in maps), 1000.0),
    ]
    for section, expected, weight in cases:
        kd = config.KD(losses=[section]).losses
        read = {
            name: value for name, value in (("logits", logits), ("embedding", embedding)) if reads(kd, name)
        }
        if reads(kd, "token"):
            read["token_logits"] = logits + 1
        output = Output(student if reads(kd, "features") else (), **read)
        total, terms = objective(output, targets, LABELS, KD, kd)
        assert terms[section["name"]].item() == pytest.approx(expected.item(), rel=1e-12), section
        assert total.item() == pytest.approx(weight * expected.item(), rel=1e-12), section


def test_losses_with_trained_layers_compare_what_these_made():
    maps = [(random(6, 5, 4, 4, seed=i), random(6, 5, 4, 4, seed=9 + i)) for i in range(2)]
    targets = Targets(tuple(t for _, t in maps), random(6, 7, seed=3))
    variance = random(1, 5, 1, 1, seed=8).exp()
    unit = [torch.nn.functional.normalize(random(6, 4, seed=30 + i)) for i in range(2)]
    cases = [
        ("hint", [s for s, _ in maps], sum(losses.hint(s, t) for s, t in maps)),
        ("reviewkd", [s for s, _ in maps], sum(losses.reviewkd(s, t) for s, t in maps)),
        (
            "vid",
            [x for s, _ in maps for x in (s, variance)],
            sum(losses.vid(s, variance, t) for s, t in maps),
        ),
        ("crd", unit, losses.crd(*unit, 0.07, LABELS)),
    ]
    for name, projected, expected in cases:
        kd = config.KD(losses=[{"name": "ce"}, {"name": name}]).losses
        output = Output((), None, random(6, 5, seed=1), projected={"1": tuple(projected)})
        _, terms = objective(output, targets, LABELS, KD, kd)
        assert terms[name].item() == pytest.approx(expected.item(), rel=1e-12), name


def test_cross_entropy_of_heads_is_their_sum():
    cohort = (random(6, 5, seed=1), random(6, 5, seed=2))
    _, terms = objective(
        Output((), None, cohort[-1], cohort=cohort), Targets(), LABELS, KD, config.KD().losses
    )
    expected = sum(cross_entropy(logits, F.one_hot(LABELS, 5)) for logits in cohort)
    assert terms["ce"].item() == pytest.approx(expected, rel=FEW)
