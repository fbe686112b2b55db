"""Create the optimizer, and set its learning rate and state phase by phase.

The learning rate is a function of the step alone, so a checkpoint does not contain it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import logging
from collections.abc import Iterator, Mapping, Set
from typing import Any

import timm.optim
import torch
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from indistill import config
from indistill.config import Config, UserError, in_one_line
from indistill.curriculum import Phase, Timetable, schedule_of

# Torch has fused versions of these: one kernel for all parameters, which skips a bad step without asking the
# host (engine.prepare).
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def create(student: nn.Module, section: config.Optimizer, fused: bool = False) -> Optimizer:
    """Create any timm optimizer, with timm's parameter groups (layer decay, parameters without weight decay).

    fused: use torch's fused version, if the optimizer has one. It takes the same steps, except that with
        `dampening` SGD's first step is damped, too.

    Raises UserError for what timm refuses, and for an argument that would have no effect.
    """
    try:
        fused = fused and timm.optim.get_optimizer_class(section.name, bind_defaults=False) in FUSED
        with _refuse_without_effect():
            optimizer = timm.optim.create_optimizer_v2(
                student,
                opt=section.name,
                lr=section.lr,
                weight_decay=section.weight_decay,
                momentum=section.momentum,
                **({"fused": True} if fused else {}) | _arguments(student, section),
            )
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"optimizer: timm refuses {section.name}: {in_one_line(error, 200)}") from None
    if isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"]:
        optimizer.register_step_pre_hook(_begin_momentum)
    return optimizer


def _arguments(student: nn.Module, section: config.Optimizer) -> dict[str, Any]:
    """Return `optimizer.kwargs` as timm takes them. Raises UserError for those that timm would ignore."""
    kwargs = dict(section.kwargs)
    info = timm.optim.get_optimizer_info(section.name.lower().split("_")[-1])
    hybrid = isinstance(info.opt_class, type) and issubclass(info.opt_class, timm.optim.Muon)
    if not info.has_momentum and section.momentum != config.Optimizer.model_fields["momentum"].default:
        raise UserError(f"optimizer.momentum: has no effect, {section.name} has no momentum: remove it")
    reasons = {
        "eps": not info.has_eps and f"{section.name} has no eps",
        "betas": not info.has_betas and f"{section.name} has no betas",
        "fallback_list": not hybrid and f"{section.name} has no fallback optimizer",
        "fallback_no_weight_decay": not hybrid and f"{section.name} has no fallback optimizer",
        "layer_decay_min_scale": kwargs.get("layer_decay") is None and "layer_decay is not set",
        "layer_decay_no_opt_scale": kwargs.get("layer_decay") is None and "layer_decay is not set",
    }
    for key, reason in reasons.items():
        if kwargs.get(key) is not None and reason:
            raise UserError(f"optimizer.kwargs.{key}: has no effect, {reason}: remove it")
    if "fallback_list" in kwargs:
        kwargs["fallback_list"] = _in_student(student, kwargs["fallback_list"])
    return kwargs


def _in_student(student: nn.Module, patterns: list[str]) -> list[str]:
    """Turn patterns of the timm model's parameters into patterns of the student's.

    Raises UserError for a pattern that matches no parameter.
    """
    names = [name for name, _ in student.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, f"net.{pattern}"):
            raise UserError(f"optimizer.kwargs.fallback_list: {pattern} names no parameter of the student")
    return [f"net.{pattern}" for pattern in patterns]


class _Warnings(logging.Handler):
    """Collects the messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def _refuse_without_effect() -> Iterator[None]:
    """Raise UserError if timm warns that an argument has no effect (layer decay of a single layer)."""
    handler = _Warnings()
    logger = logging.getLogger(timm.optim.__name__)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    for message in handler.messages:
        if "no effect" in message:
            raise UserError(f"optimizer.kwargs: {' '.join(message.split())[:200]}: remove it")


def _begin_momentum(optimizer: Optimizer, *_: Any) -> None:
    """Start the momentum of parameters that have their first gradient at zero.

    Torch's fused SGD starts it for all parameters or none, but a new phase adds some parameters to others.
    The step is the same: 0 * momentum + gradient.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


class PhaseOptim:
    """Sets learning rate and optimizer state for a step, phase by phase; the optimizer stays the same object.

    `unused` maps the pairs of a phase to the parameters that it leaves as they are. An optimizer skips
    parameters without a gradient by itself. Under ZeRO they have gradients of zero, with which it would let
    them decay and count steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        settings: Config,
        timetable: Timetable,
        unused: Mapping[tuple[int, ...], Set[Tensor]] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.settings = settings
        self.timetable = timetable
        self.pairs: tuple[int, ...] | None = None  # of the last step's phase
        self.stale_gradients: Tensor | None = None  # cleared when the pairs change (engine.stale_gradients)
        self.aside: list[tuple[dict[str, Any], list[Tensor]]] = []  # groups and their unused parameters
        if unused:
            _split_groups(optimizer, unused)
            optimizer.register_step_pre_hook(self._set_unused_aside)
            optimizer.register_step_post_hook(self._put_unused_back)
        phases = timetable.curriculum.phases()
        self.schedulers = {phase: _scheduler(optimizer, settings, phase, timetable) for phase in phases}
        self.options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        if {_section(settings, phase).reset_optimizer for phase in phases} != {"never"} and (
            optimizer.state or isinstance(optimizer, timm.optim.Lookahead)
        ):
            raise UserError(
                f"reset_optimizer: {settings.optimizer.name} does not build its state anew: set never, or "
                "choose another optimizer.name"
            )

    def begin_step(self, step: int, phase: Phase) -> float:
        """Prepare the optimizer for a step of a phase; return the learning rate."""
        if phase not in self.schedulers:  # with `curriculum: auto`, phases begin earlier than planned
            self.schedulers[phase] = _scheduler(self.optimizer, self.settings, phase, self.timetable)
        reset = _section(self.settings, phase).reset_optimizer
        new_epoch = step % self.timetable.steps_per_epoch == 0
        if (reset != "never" and step == phase.start) or (reset == "epoch" and new_epoch):
            self._reset()
        if phase.pairs != self.pairs and self.stale_gradients is not None:
            self.stale_gradients.zero_()
        self.pairs = phase.pairs
        self.schedulers[phase].step_update(step - int(phase.start))
        # Layer decay scales the rate of all layers but the last.
        return next(group["lr"] for group in self.optimizer.param_groups if group.get("lr_scale", 1.0) == 1.0)

    def _reset(self) -> None:
        """Clear the state, without `load_state_dict`, which does not fit DeepSpeed's partitions."""
        self.optimizer.state.clear()
        for group, options in zip(self.optimizer.param_groups, self.options):
            for counter in group.keys() - options.keys() - {"params"}:  # Lamb and Adan count steps there
                del group[counter]
            group.update(options)

    def _set_unused_aside(self, optimizer: Optimizer, *_: Any) -> None:
        """Take the phase's unused parameters out of the optimizer for the time of a step."""
        self.aside = [
            (group, group["params"]) for group in optimizer.param_groups if self.pairs in group["unused_in"]
        ]
        for group, _parameters in self.aside:
            group["params"] = []

    def _put_unused_back(self, *_: Any) -> None:
        for group, parameters in self.aside:
            group["params"] = parameters


def _split_groups(optimizer: Optimizer, unused: Mapping[tuple[int, ...], Set[Tensor]]) -> None:
    """Split each parameter group by the phases that leave a parameter unused; `unused_in` lists them."""
    groups = []
    for group in optimizer.param_groups:
        by_phases: dict[tuple[tuple[int, ...], ...], list[Tensor]] = {}
        for parameter in group["params"]:
            phases = tuple(pairs for pairs, parameters in unused.items() if parameter in parameters)
            by_phases.setdefault(phases, []).append(parameter)
        for phases, unused_parameters in by_phases.items():
            groups.append({**group, "params": unused_parameters, "unused_in": phases})
    optimizer.param_groups[:] = groups


def _section(settings: Config, phase: Phase) -> config.PhaseTraining:
    """The config's section for the phase."""
    if not phase.pairs:
        return settings.kd
    assert settings.warmup is not None  # or no phase would have pairs
    return settings.warmup


def _scheduler(optimizer: Optimizer, settings: Config, phase: Phase, timetable: Timetable) -> Scheduler:
    """Create timm's scheduler for a phase; its steps are counted from the start of the phase."""
    _, section = schedule_of(settings, phase)
    length = int((timetable.total_steps if phase.end is None else phase.end) - phase.start)
    for group in optimizer.param_groups:
        group["initial_lr"] = _base_rate(settings, phase)  # timm's schedulers start from it
    warmup: dict[str, Any] = {
        "warmup_t": timetable.steps(section.warmup),
        "warmup_lr_init": section.warmup_lr,
        "warmup_prefix": False,  # the other durations count from the start of the phase, too
        "t_in_epochs": False,
    }
    match section.name:
        case "cosine":
            return CosineLRScheduler(optimizer, t_initial=max(length, 1), lr_min=section.min_lr, **warmup)
        case "step":
            decay_every = timetable.steps(section.decay_every)
            return StepLRScheduler(optimizer, decay_t=decay_every, decay_rate=section.decay_rate, **warmup)
        case "multistep":
            # timm decays one step early.
            decay_at = [timetable.steps(duration) + 1 for duration in section.decay_at]
            return MultiStepLRScheduler(optimizer, decay_t=decay_at, decay_rate=section.decay_rate, **warmup)
        case "constant":
            return StepLRScheduler(optimizer, decay_t=1, decay_rate=1.0, **warmup)


def _base_rate(settings: Config, phase: Phase) -> float:
    rate = _section(settings, phase).lr or settings.optimizer.lr
    return rate[phase.index] if isinstance(rate, list) else rate
