"""KD with other tools, torchdistill and timm; used by step.py and time_to_accuracy.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from indistill.models.network import Network

Step = Callable[[Tensor, Tensor], Tensor]  # from normalised images and labels to the loss
CPU = torch.device("cpu")
LOSS = {"weight": 1.0, "temperature": 4.0}  # of indistill's ce and kd by default


def logit_task(
    teacher: nn.Module, student: nn.Module, device: torch.device, *, weight: float, temperature: float
) -> nn.Module:
    """Return timm's task of cross-entropy and KL divergence, each with this weight."""
    from timm.task import LogitDistillationTask

    task = LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), task_loss_weight=weight, distill_loss_weight=weight,
        temperature=temperature, device=device, verbose=False,
    ).to(device)  # fmt: skip
    return task.train()


def distillation_box(
    teacher: nn.Module,
    student: nn.Module,
    device: torch.device,
    optimizer: dict[str, Any],
    *,
    weight: float,
    temperature: float,
) -> Any:
    """Return torchdistill's box with its KDLoss: cross-entropy and KL divergence, each with this weight."""
    from torchdistill.core.distillation import DistillationBox

    network = {"forward_proc": "forward_batch_only", "sequential": [], "wrapper": None}
    kd = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": "."}
    kd |= {"teacher_module_io": "output", "temperature": temperature, "reduction": "batchmean"}
    kd |= {"alpha": weight, "beta": weight}
    criterion = {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"weight": 1.0}}}}
    criterion["kwargs"]["sub_terms"]["kd"]["criterion"] = {"key": "KDLoss", "kwargs": kd}
    settings = {
        "num_epochs": 1,
        "teacher": {**network, "requires_grad": False},
        "student": {**network, "requires_grad": True},
        "optimizer": optimizer,
        "criterion": criterion,
    }
    box = DistillationBox(teacher, student, {}, settings, device, [0], False, 1)
    box.pre_epoch_process(epoch=0)
    return box


def timm_step(teacher: Network, student: Network, optimizer: torch.optim.Optimizer) -> Step:
    task = logit_task(teacher.net, student.net, CPU, **LOSS)  # it normalises anew for the teacher

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


class Renormalised(nn.Module):
    """A teacher that reads images with the student's normalisation."""

    def __init__(self, teacher: Network, student: Network) -> None:
        super().__init__()
        self.net = teacher.net
        self.scale, self.shift = student.std / teacher.std, (student.mean - teacher.mean) / teacher.std

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images * self.scale + self.shift)


def torchdistill_step(teacher: Network, student: Network, optimizer: torch.optim.Optimizer) -> Step:
    own = {"key": "AdamW", "kwargs": {"lr": 1.0}}
    box = distillation_box(Renormalised(teacher, student), student.net, CPU, own, **LOSS)
    box.optimizer = optimizer  # its own would let biases and norms decay

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = box.forward_process(images, labels, None)
        box.post_forward_process(loss=loss)
        return loss.detach()

    return step


STEPS = {"timm": timm_step, "torchdistill": torchdistill_step}
