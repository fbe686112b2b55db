"""Optimizer and learning rate. The rate is a function of the step alone, so a checkpoint need not hold it."""

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
from indistill.curriculum import Phase, Timetable

# Of torch: one kernel for all parameters, which also leaves out a bad step without asking the host (engine.prepare).
FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def create(student: nn.Module, section: config.Optimizer, fused: bool = False) -> Optimizer:
    """Any timm optimizer, with timm's groups of parameters: its layer decay, and what gets no weight decay.

    `fused`: in torch's fused version, if it has one, which takes the same steps. (With `dampening`, SGD's first one is
    damped, too.) Raises UserError for what timm refuses, and for an argument that would have no effect.
    """
    try:
        fused = fused and timm.optim.get_optimizer_class(section.name, bind_defaults=False) in FUSED
        with _without_effect_is_refused():
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
    """`optimizer.kwargs` as timm takes them. Raises UserError for those that timm would drop without a word."""
    kwargs, info = dict(section.kwargs), timm.optim.get_optimizer_info(section.name.lower().split("_")[-1])
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
    """Patterns of the timm model's parameters as patterns of the student's. UserError for one that names none."""
    names = [name for name, _ in student.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, f"net.{pattern}"):
            raise UserError(f"optimizer.kwargs.fallback_list: {pattern} names no parameter of the student")
    return [f"net.{pattern}" for pattern in patterns]


@contextlib.contextmanager
def _without_effect_is_refused() -> Iterator[None]:
    """Raise UserError where timm warns that an argument has no effect (layer decay of a single layer)."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger(timm.optim.__name__)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    for message in messages:
        if "no effect" in message:
            raise UserError(f"optimizer.kwargs: {' '.join(message.split())[:200]}: remove it")


def _begin_momentum(optimizer: Optimizer, *_: Any) -> None:
    """Momentum zero for parameters that have their first gradient, which torch's fused SGD gives to all or none.

    They may be some of many where the curriculum moves on. The step is the same: 0 * momentum + gradient.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


class PhaseOptim:
    """Sets learning rate and optimizer state for a step, phase by phase; the optimizer stays the same object.

    `unused` maps the pairs of a phase to parameters that it takes no step with. An optimizer skips those without a
    gradient by itself; ZeRO gives them zeros, with which it would let them decay, and count the steps.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        settings: Config,
        timetable: Timetable,
        unused: Mapping[tuple[int, ...], Set[Tensor]] | None = None,
    ) -> None:
        self.optimizer, self.settings, self.timetable = optimizer, settings, timetable
        self.pairs: tuple[int, ...] | None = None  # of the phase that the last step was in
        self.stale_gradients: Tensor | None = (
            None  # to be cleared when the pairs change (engine.stale_gradients)
        )
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
                f"reset_optimizer: {settings.optimizer.name} does not build its state anew: set never, or choose "
                "another optimizer.name"
            )

    def begin_step(self, step: int, phase: Phase) -> float:
        """Prepare the optimizer for a step of a phase; returns the learning rate."""
        if phase not in self.schedulers:  # of a curriculum that sets its own pace
            self.schedulers[phase] = _scheduler(self.optimizer, self.settings, phase, self.timetable)
        reset, new_epoch = (
            _section(self.settings, phase).reset_optimizer,
            step % self.timetable.steps_per_epoch == 0,
        )
        if (reset != "never" and step == phase.start) or (reset == "epoch" and new_epoch):
            self._reset()
        if phase.pairs != self.pairs and self.stale_gradients is not None:
            self.stale_gradients.zero_()
        self.pairs = phase.pairs
        self.schedulers[phase].step_update(step - phase.start)
        # Layer decay scales the rate of all layers but the last.
        return next(group["lr"] for group in self.optimizer.param_groups if group.get("lr_scale", 1.0) == 1.0)

    def _reset(self) -> None:
        """As if newly created. Not by `load_state_dict`, which DeepSpeed's partitions would not fit."""
        self.optimizer.state.clear()
        for group, options in zip(self.optimizer.param_groups, self.options):
            for counter in group.keys() - options.keys() - {"params"}:  # where Lamb and Adan count
                del group[counter]
            group.update(options)

    def _set_unused_aside(self, optimizer: Optimizer, *_: Any) -> None:
        self.aside = [
            (group, group["params"]) for group in optimizer.param_groups if self.pairs in group["unused_in"]
        ]
        for group, _ in self.aside:
            group["params"] = []

    def _put_unused_back(self, *_: Any) -> None:
        for group, parameters in self.aside:
            group["params"] = parameters


def _split_groups(optimizer: Optimizer, unused: Mapping[tuple[int, ...], Set[Tensor]]) -> None:
    """Split each group into parameters that the same phases leave unused, which the group then names."""
    groups = []
    for group in optimizer.param_groups:
        together: dict[tuple[tuple[int, ...], ...], list[Tensor]] = {}
        for parameter in group["params"]:
            where = tuple(pairs for pairs, parameters in unused.items() if parameter in parameters)
            together.setdefault(where, []).append(parameter)
        groups += [{**group, "params": params, "unused_in": where} for where, params in together.items()]
    optimizer.param_groups[:] = groups


def _section(settings: Config, phase: Phase) -> config.PhaseTraining:
    return settings.warmup if phase.pairs else settings.kd


def _scheduler(optimizer: Optimizer, settings: Config, phase: Phase, timetable: Timetable) -> Scheduler:
    own = _section(settings, phase)
    section = own.schedule or settings.schedule
    rate = own.lr or settings.optimizer.lr
    if isinstance(rate, list):
        if len(rate) != timetable.curriculum.pairs:
            raise UserError(
                f"warmup.lr: {len(rate)} values for {timetable.curriculum.pairs} pairs: give one per pair"
            )
        rate = rate[phase.index]
    length = (timetable.total_steps if phase.end is None else phase.end) - phase.start
    for group in optimizer.param_groups:
        group["initial_lr"] = rate  # where timm's schedulers take their base rate from
    warmup = {
        "warmup_t": timetable.steps(section.warmup),
        "warmup_lr_init": section.warmup_lr,
        "warmup_prefix": False,  # every count begins with the phase
        "t_in_epochs": False,
    }
    match section.name:
        case "cosine":
            return CosineLRScheduler(optimizer, t_initial=max(length, 1), lr_min=section.min_lr, **warmup)
        case "step":
            decay_every = timetable.steps(section.decay_every)
            if decay_every < 1:
                raise UserError(
                    f"schedule.decay_every: {section.decay_every} is less than one step: raise it"
                )
            return StepLRScheduler(optimizer, decay_t=decay_every, decay_rate=section.decay_rate, **warmup)
        case "multistep":
            decay_at = [
                timetable.steps(duration) + 1 for duration in section.decay_at
            ]  # timm decays one step early
            return MultiStepLRScheduler(optimizer, decay_t=decay_at, decay_rate=section.decay_rate, **warmup)
        case "constant":
            return StepLRScheduler(optimizer, decay_t=1, decay_rate=1.0, **warmup)
