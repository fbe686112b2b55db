"""Optimizer and learning rate. The rate is a function of the step alone, so a checkpoint need not hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import timm.optim
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from indistill import config
from indistill.config import Config, UserError
from indistill.curriculum import Phase


def create(student: nn.Module, section: config.Optimizer) -> Optimizer:
    """Any timm optimizer; as timm does, biases and norms get no weight decay. UserError if timm refuses."""
    try:
        return timm.optim.create_optimizer_v2(
            student,
            opt=section.name,
            lr=section.lr,
            weight_decay=section.weight_decay,
            momentum=section.momentum,
            **section.kwargs,
        )
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"optimizer: timm refuses {section.name}: {' '.join(str(error).split())[:200]}") from None


class PhaseOptim:
    """Sets learning rate and optimizer state for a step, phase by phase; optimizer and wrapper stay the same objects."""

    def __init__(
        self,
        optimizer: Optimizer,
        settings: Config,
        phases: Sequence[Phase],
        total_steps: int,
        steps_per_epoch: int,
        to_steps: Callable[[config.Duration], int],
    ) -> None:
        self.optimizer, self.steps_per_epoch = optimizer, steps_per_epoch
        self.reset = {phase: _section(settings, phase).reset_optimizer for phase in phases}
        self.schedulers = {}
        for phase in phases:
            section = _section(settings, phase)
            rate = section.lr[phase.index] if isinstance(section.lr, list) else section.lr or settings.optimizer.lr
            length = (total_steps if phase.end is None else phase.end) - phase.start
            self.schedulers[phase] = _scheduler(
                optimizer, rate, section.schedule or settings.schedule, length, to_steps
            )

    def begin_step(self, step: int, phase: Phase) -> float:
        """Prepare the optimizer for a step of a phase; returns the learning rate."""
        reset = self.reset[phase]
        if (reset != "never" and step == phase.start) or (reset == "epoch" and step % self.steps_per_epoch == 0):
            self.optimizer.state.clear()  # every torch and timm optimizer builds its state anew when it is empty
        self.schedulers[phase].step_update(step - phase.start)
        return self.optimizer.param_groups[0]["lr"]


def _section(settings: Config, phase: Phase) -> config.PhaseTraining:
    return settings.warmup if phase.pairs else settings.kd


def _scheduler(
    optimizer: Optimizer,
    rate: float,
    section: config.Schedule,
    length: int,
    to_steps: Callable[[config.Duration], int],
) -> Scheduler:
    for group in optimizer.param_groups:
        group["initial_lr"] = rate  # where timm's schedulers take their base rate from
    warmup = {"warmup_t": to_steps(section.warmup), "warmup_lr_init": section.warmup_lr, "t_in_epochs": False}
    match section.name:
        case "cosine":
            return CosineLRScheduler(optimizer, t_initial=max(length, 1), lr_min=section.min_lr, **warmup)
        case "step":
            decay_every = to_steps(section.decay_every)
            return StepLRScheduler(optimizer, decay_t=decay_every, decay_rate=section.decay_rate, **warmup)
        case "multistep":
            decay_at = [to_steps(duration) for duration in section.decay_at]
            return MultiStepLRScheduler(optimizer, decay_t=decay_at, decay_rate=section.decay_rate, **warmup)
        case "constant":
            return StepLRScheduler(optimizer, decay_t=1, decay_rate=1.0, **warmup)
