"""Learning rates against formulas, and the optimizer's state against a loop with new optimizers."""

import math

import pytest
import timm.optim
import torch
from conftest import newer_timm
from torch import nn

from indistill import config
from indistill.config import UserError
from indistill.curriculum import Timetable
from indistill.models import timm_model
from indistill.models.network import Network
from indistill.training import optim

STEPS_PER_EPOCH = 5


@pytest.fixture
def build(tree):
    """An optimizer, a timetable and a PhaseOptim; warm-up pairs last 10, 0 and 15 steps of 60."""

    def build(network=None, **changes):
        durations = ["2 epochs", "0 epochs", "3 epochs"]
        warmup = {"curriculum": "sequential", "durations": durations, **changes.pop("warmup", {})}
        kd = tree["kd"] | changes.pop("kd", {})
        settings = config.parse(
            tree | {"duration": "12 epochs", "warmup": warmup, "kd": kd} | changes, "test"
        )
        timetable = Timetable.of(settings, STEPS_PER_EPOCH, pairs=3)
        optimizer = optim.create(network or nn.Linear(3, 2), settings.optimizer)
        return optimizer, timetable, optim.PhaseOptim(optimizer, settings, timetable)

    return build


def rates(built, steps=range(60)):
    optimizer, timetable, phase_optim = built
    found = []
    for step in steps:
        rate = phase_optim.begin_step(step, timetable.curriculum.at(step))
        assert {group["lr"] for group in optimizer.param_groups} == {rate}
        found.append(rate)
    return found


# --- learning rate ------------------------------------------------------------------------------------------


def adam(lr=0.4):
    return {"name": "adam", "lr": lr}


def test_constant(build):
    assert rates(build(optimizer=adam())) == [0.4] * 60


def test_cosine_falls_over_each_phase(build):
    found = rates(build(optimizer=adam(), schedule={"name": "cosine", "min_lr": 0.1}))
    expected = [
        0.1 + 0.3 * (1 + math.cos(math.pi * t / length)) / 2
        for length in (10, 15, 35)  # pair 1, pair 3, kd
        for t in range(length)
    ]
    assert found == pytest.approx(expected)


def test_step_decays_every_so_often_from_the_phases_start(build):
    schedule = {"name": "step", "decay_every": "8 steps", "decay_rate": 0.5}
    found = rates(build(optimizer=adam(), schedule=schedule))
    assert found == pytest.approx([0.4 * 0.5 ** (t // 8) for length in (10, 15, 35) for t in range(length)])


def test_multistep_decays_at_the_very_steps_named(build):
    schedule = {"name": "multistep", "decay_at": ["3 epochs", "20 steps"], "decay_rate": 0.1}
    found = rates(build(optimizer=adam(), kd={"schedule": schedule}))
    assert found[:25] == [0.4] * 25
    assert found[25:] == pytest.approx([0.4] * 15 + [0.04] * 5 + [0.004] * 15)


@pytest.mark.parametrize("name", ["constant", "cosine", "step", "multistep"])
def test_every_phase_warms_up(build, name):
    schedule = {
        "name": name,
        "warmup": "4 steps",
        "warmup_lr": 0.2,
        "decay_every": "6 steps",
        "decay_at": ["6 steps"],
        "decay_rate": 0.5,
    }
    found = rates(build(optimizer=adam(), schedule=schedule))

    def expected(t, length):
        if t < 4:
            return 0.2 + 0.2 * t / 4
        return {
            "constant": 0.4,
            "cosine": 0.4 * (1 + math.cos(math.pi * t / length)) / 2,
            "step": 0.4 * 0.5 ** (t // 6),
            "multistep": 0.4 if t < 6 else 0.2,
        }[name]

    assert found == pytest.approx([expected(t, length) for length in (10, 15, 35) for t in range(length)])


def test_phases_have_their_own_rates_and_schedules(build):
    found = rates(
        build(
            optimizer=adam(),
            schedule={"name": "cosine"},
            warmup={"lr": 0.1, "schedule": {"name": "constant"}},
            kd={"lr": 0.8},
        )
    )
    assert found[:25] == [0.1] * 25
    assert found[25:] == pytest.approx([0.8 * (1 + math.cos(math.pi * t / 35)) / 2 for t in range(35)])


def test_a_rate_per_pair_goes_by_the_pairs_own_number(build):
    found = rates(build(optimizer=adam(), warmup={"lr": [0.1, 0.2, 0.3]}))
    assert found == [0.1] * 10 + [0.3] * 15 + [0.4] * 35  # the second pair is skipped
    with pytest.raises(UserError, match=r"warmup.lr: 2 values for 3 pairs: give one per pair"):
        build(optimizer=adam(), warmup={"lr": [0.1, 0.2]})


def test_the_rate_depends_on_the_step_alone(build):
    changes = {"schedule": {"name": "cosine", "warmup": "3 steps"}, "kd": {"schedule": {"name": "step"}}}
    in_order = rates(build(**changes))
    backwards = rates(build(**changes), steps=reversed(range(60)))
    assert backwards == in_order[::-1]
    assert rates(build(**changes), steps=[47]) == [in_order[47]]


def test_a_schedule_that_decays_at_every_instant_is_refused(build):
    with pytest.raises(UserError, match=r"schedule.decay_every: 3 samples is less than one step"):
        build(schedule={"name": "step", "decay_every": "3 samples"})


# --- optimizer ----------------------------------------------------------------------------------------------


def test_what_timm_refuses_is_told_in_one_line():
    for section, reason in [
        ({"name": "adamm"}, "adamm not found"),
        ({"name": "adamw", "kwargs": {"momentun": 0.9}}, "momentun"),
        ({"name": "adamw", "kwargs": {"betas": [2, 3]}}, "Invalid beta"),
    ]:
        with pytest.raises(
            UserError, match=f"^optimizer: timm refuses {section['name']}: .*{reason}"
        ) as caught:
            optim.create(nn.Linear(3, 2), config.Optimizer(lr=0.1, **section))
        assert "\n" not in str(caught.value)


def test_arguments_reach_the_optimizer():
    section = config.Optimizer(name="sgd", lr=0.3, momentum=0.7, weight_decay=0.02, kwargs={"nesterov": True})
    optimizer = optim.create(nn.Conv2d(3, 2, 3, bias=False), section)
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["momentum"] == 0.7
    assert optimizer.defaults["nesterov"]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups if group["params"]] == [
        (0.3, 0.02)
    ]


def test_biases_norms_positions_and_tokens_do_not_decay():
    net = timm_model.create(config.Model(name="test_vit"), num_classes=10, image_size=32, role="student")
    network = Network(net, ((0.5,) * 3, (0.5,) * 3), adapters={0: nn.Conv2d(4, 8, 1)})
    optimizer = optim.create(network, config.Optimizer(name="adamw", lr=0.1, weight_decay=0.05))
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    decayed = {
        names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    matrices = {name for name, p in network.named_parameters() if p.ndim > 1}
    assert matrices - decayed == {"net.pos_embed", "net.cls_token"}
    assert decayed <= matrices
    assert "adapters.0.weight" in decayed


# --- groups of parameters, as timm makes them ---------------------------------------------------------------


def bare_and_wrapped(name):
    """A timm model, and the same as a student with an adapter and a projector beside it."""
    section = config.Model(name=name)
    nets = [timm_model.create(section, num_classes=10, image_size=32, role="student") for _ in range(2)]
    beside = {
        "adapters": {0: nn.Conv2d(4, 8, 1)},
        "projectors": {"1": nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))},
    }
    return nets[0], Network(nets[1], ((0.5,) * 3, (0.5,) * 3), **beside)


def of_each_parameter(model, optimizer):
    """Each parameter's learning rate, weight decay, and whether it goes to the fallback optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    told = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in told
            scale, fallback = group.get("lr_scale", 1.0), group.get("use_fallback", False)
            told[names[id(parameter)]] = (group["lr"] * scale, group["weight_decay"], fallback)
    return told


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("adamw", {}),
        ("adamw", {"layer_decay": 0.5}),
        ("adamw", {"layer_decay": 0.5, "layer_decay_min_scale": 0.3, "filter_bias_and_bn": False}),
        ("momentum", {"layer_decay": 0.75, "layer_decay_no_opt_scale": 0.5}),
        ("muon", {"layer_decay": 0.9, "fallback_list": ["*norm*"], "fallback_no_weight_decay": True}),
    ],
)
@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "test_efficientnet", "cnn32_student"])
def test_every_parameter_is_treated_as_timm_treats_it_in_the_bare_model(model, name, kwargs):
    if model == "cnn32_student" and "fallback_list" in kwargs:
        kwargs = kwargs | {"fallback_list": ["*_bn*"]}
    if model == "test_efficientnet" and "fallback_list" in kwargs:
        kwargs = kwargs | {"fallback_list": ["*bn*"]}
    bare, student = bare_and_wrapped(model)
    section = config.Optimizer(name=name, lr=0.1, weight_decay=0.05, kwargs=kwargs)
    theirs = timm.optim.create_optimizer_v2(bare, opt=name, lr=0.1, weight_decay=0.05, momentum=0.9, **kwargs)
    told = of_each_parameter(student, optim.create(student, section))
    expected = of_each_parameter(bare, theirs)
    assert {
        name.removeprefix("net."): one for name, one in told.items() if name.startswith("net.")
    } == expected
    assert (len({rate for rate, *_ in expected.values()}) > 1) == ("layer_decay" in kwargs)
    frozen = {name for name, parameter in bare.named_parameters() if not parameter.requires_grad}
    assert {f"net.{name}" for name in frozen} == {
        n for n, p in student.named_parameters() if not p.requires_grad
    }

    # What stands beside the model is as new as its classifier: the full rate, and weight decay by the same
    # rule.
    one_dimensional = 0.05 if kwargs.get("filter_bias_and_bn") is False else 0.0
    beside = {name: one[:2] for name, one in told.items() if not name.startswith("net.")}
    assert beside == {
        "adapters.0.weight": (0.1, 0.05),
        "adapters.0.bias": (0.1, one_dimensional),
        "projectors.1.0.weight": (0.1, 0.05),
        "projectors.1.0.bias": (0.1, one_dimensional),
        "projectors.1.1.weight": (0.1, one_dimensional),
        "projectors.1.1.bias": (0.1, one_dimensional),
    }


def test_layer_decay_scales_the_schedule(build):
    _, student = bare_and_wrapped("test_vit")
    section = {"name": "adamw", "lr": 0.4, "kwargs": {"layer_decay": 0.5}}
    optimizer, timetable, phase_optim = build(student, optimizer=section, schedule={"name": "cosine"})
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert min(scales.values()) <= 0.5**6
    for step in (0, 7, 12, 40):
        rate = phase_optim.begin_step(step, timetable.curriculum.at(step))
        start, length = {0: (0, 10), 7: (0, 10), 12: (10, 15), 40: (25, 35)}[step]
        assert rate == pytest.approx(0.4 * (1 + math.cos(math.pi * (step - start) / length)) / 2)
        for group in optimizer.param_groups:
            assert group["lr"] == rate * scales[id(group["params"][0])]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"name": "sgd", "kwargs": {"eps": 1e-6}},
            "optimizer.kwargs.eps: has no effect, sgd has no eps: remove it",
        ),
        (
            {"name": "adadelta", "kwargs": {"betas": [0.9, 0.99]}},
            "kwargs.betas: has no effect, adadelta has no betas",
        ),
        (
            {"name": "adamw", "momentum": 0.5},
            "optimizer.momentum: has no effect, adamw has no momentum: remove it",
        ),
        (
            {"name": "adamw", "kwargs": {"layer_decay_min_scale": 0.1}},
            "kwargs.layer_decay_min_scale: has no effect, layer_decay is not set",
        ),
        (
            {"name": "adamw", "kwargs": {"layer_decay_no_opt_scale": 0.1}},
            "kwargs.layer_decay_no_opt_scale: has no effect, layer_decay is not set",
        ),
        ({"name": "adamw", "kwargs": {"fallback_list": ["fc"]}}, "adamw has no fallback optimizer"),
        ({"name": "adamw", "kwargs": {"fallback_no_weight_decay": True}}, "adamw has no fallback optimizer"),
        ({"name": "muon", "kwargs": {"fallback_list": ["hed*"]}}, r"fallback_list: hed\* names no parameter"),
        ({"name": "lookahead_sgd", "kwargs": {"eps": 1e-6}}, "lookahead_sgd has no eps"),
    ],
)
def test_an_argument_without_effect_is_refused(section, message):
    _, student = bare_and_wrapped("cnn32_student")
    with pytest.raises(UserError, match=message):
        optim.create(student, config.Optimizer(lr=0.1, **section))


@newer_timm
def test_layer_decay_of_a_single_layer_is_refused():
    section = config.Optimizer(name="adamw", lr=0.1, kwargs={"layer_decay": 0.5})
    with pytest.raises(
        UserError, match=r"^optimizer.kwargs: Layer-wise lr decay has no effect, all parameters were"
    ):
        optim.create(nn.Linear(3, 2), section)


def test_layers_that_the_warmup_trains_are_not_frozen(tree):
    tree["optimizer"]["kwargs"] = {"layer_decay": 0.5, "layer_decay_no_opt_scale": 0.1}
    with pytest.raises(
        UserError, match=r"layer_decay_no_opt_scale freezes the first layers, which warmup trains"
    ):
        config.parse(tree, "test")
    config.parse(tree | {"warmup": None}, "test")


# --- resets -------------------------------------------------------------------------------------------------


def train(network, step_of, steps=60):
    """Train on data that depends on the step; `step_of(step)` is called after the gradients are there."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        network.zero_grad()
        network(torch.randn(4, 3, generator=generator)).square().mean().backward()
        step_of(step)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("warmup", "kd", "anew_at"),
    [
        ("never", "never", {0}),
        ("start", "never", {0, 10}),
        ("never", "start", {0, 25}),
        ("start", "start", {0, 10, 25}),
        ("epoch", "start", {0, 5, 10, 15, 20, 25}),
        ("epoch", "epoch", set(range(0, 60, 5))),
    ],
)
def test_a_reset_is_a_new_adam(build, warmup, kd, anew_at):
    ours, theirs = small_network(), small_network()
    optimizer, timetable, phase_optim = build(
        ours,
        optimizer={"name": "adam", "lr": 0.01},
        warmup={"reset_optimizer": warmup},
        kd={"reset_optimizer": kd, "lr": 0.02},
    )

    def our_step(step):
        phase_optim.begin_step(step, timetable.curriculum.at(step))
        optimizer.step()
        assert phase_optim.optimizer is optimizer

    reference = None

    def their_step(step):
        nonlocal reference
        if step in anew_at:
            reference = torch.optim.Adam(theirs.parameters())
        for group in reference.param_groups:
            group["lr"] = 0.01 if step < 25 else 0.02
        reference.step()

    train(ours, our_step)
    train(theirs, their_step)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(a, b)


def test_a_phase_that_begins_within_an_epoch_resets_then(build):
    network = small_network()
    optimizer, timetable, phase_optim = build(
        network,
        optimizer={"name": "adam", "lr": 0.01},
        warmup={"durations": ["7 steps", 0, 0], "reset_optimizer": "epoch"},
        kd={"reset_optimizer": "epoch"},
    )
    empty_at = []

    def step_of(step):
        phase_optim.begin_step(step, timetable.curriculum.at(step))
        if not optimizer.state:
            empty_at.append(step)
        optimizer.step()

    train(network, step_of, steps=16)
    assert empty_at == [0, 5, 7, 10, 15]


@pytest.mark.parametrize("name", ["adagrad", "lookahead_adam"])
def test_what_cannot_be_reset_is_refused(build, name):
    build(optimizer={"name": name, "lr": 0.01})
    with pytest.raises(UserError, match=f"reset_optimizer: {name} does not build its state anew: set never"):
        build(optimizer={"name": name, "lr": 0.01}, kd={"reset_optimizer": "epoch"})


@pytest.mark.parametrize("name", ["sgd", "adamw", "nadamw", "lamb", "adan", "lion", "madgrad"])
def test_a_reset_leaves_nothing_of_the_past(build, name):
    ours = small_network()
    optimizer, timetable, phase_optim = build(
        ours,
        optimizer={"name": name, "lr": 0.01, "weight_decay": 0.01},
        warmup={"reset_optimizer": "start"},
        kd={"reset_optimizer": "start"},
    )
    theirs = small_network()
    reference = None

    def step_of(step):
        nonlocal reference
        phase_optim.begin_step(step, timetable.curriculum.at(step))
        if step == 25:
            theirs.load_state_dict(ours.state_dict())
            reference = timm.optim.create_optimizer_v2(
                theirs, opt=name, lr=0.01, weight_decay=0.01, momentum=0.9
            )
        if step >= 25:
            for p, q in zip(ours.parameters(), theirs.parameters()):
                q.grad = p.grad.clone()
            reference.step()
        optimizer.step()

    train(ours, step_of, steps=35)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)
