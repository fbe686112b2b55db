"""Create timm models, load their weights, and check that they have what training needs."""

from __future__ import annotations

import contextlib
import difflib
import pickle

import timm
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from indistill import config
from indistill.config import UserError, in_one_line

_OTHER_WEIGHTS = {
    "checkpoint_path",
    "pretrained_strict",
}  # of timm.create_model: what weights it ends up with
_TRAINING_PARTS = ("adapters.", "projectors.")  # of Network: in checkpoints, but not the student's own


class NoWeights(UserError):
    """A model's pretrained weights could not be had; `role` says whose, student or teacher."""

    def __init__(self, message: str, role: str) -> None:
        super().__init__(message)
        self.role = role


def create(section: config.Model, num_classes: int, image_size: int, role: str) -> nn.Module:
    """The bare timm model that a `student` or `teacher` section describes.

    Raises UserError for an unknown name, weights that cannot be had or do not fit, a head of another size than
    `num_classes`, and a head that does not follow timm's interface. Nothing is ever initialised at random silently.
    """
    if not section.name.startswith(("local-dir:", "hf-hub:")) and not timm.is_model(section.name):
        close = difflib.get_close_matches(section.name, timm.list_models(), n=3)
        raise UserError(
            f"{role}.name: timm has no model {section.name!r}" + (f"; near: {', '.join(close)}" * bool(close))
        )
    for key in _OTHER_WEIGHTS & section.kwargs.keys():
        raise UserError(
            f"{role}.kwargs.{key}: would load other weights, or only some: give {role}.checkpoint instead"
        )
    # Asked for another number of classes, timm would replace a pretrained head by a random one.
    kwargs = {**section.kwargs} if section.pretrained else {"num_classes": num_classes, **section.kwargs}
    try:
        net = timm.create_model(section.name, pretrained=section.pretrained, **kwargs)
    except Exception as error:  # timm, the hub client and the network each raise their own
        instead = f" (for weights in a file: {role}.pretrained: false, {role}.checkpoint: FILE)" * (
            role != "eval"
        )
        reason = in_one_line(error, 300)
        message = f"{role}: timm could not create {section.name}: {reason}" + instead * section.pretrained
        raise (NoWeights(message, role) if section.pretrained else UserError(message)) from None
    if net.num_classes != num_classes:
        raise UserError(
            f"{role}: the head of {section.name} has {net.num_classes} classes, data.num_classes is {num_classes}: "
            "use weights trained for this data set"
        )
    if role == "teacher" and section.pretrained and "num_classes" in kwargs:
        raise UserError(
            "teacher.kwargs.num_classes: timm would replace the head of another size by a random one: remove it, and "
            "use weights trained for this data set"
        )
    if section.checkpoint:
        _load_weights(net, section.checkpoint, role)
    _check_interface(net, section.name, image_size, role)
    return net


def _load_weights(net: nn.Module, path: str, role: str) -> None:
    try:
        state = load_state_dict(path, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{role}.checkpoint: no file {path}") from None
    except Exception as error:  # a damaged file fails in pickle, zip or safetensors
        reason = in_one_line(error, 200)
        if isinstance(error.__cause__, pickle.UnpicklingError):
            reason = "damaged, or it holds objects other than tensors, which may run code: save the state dict alone"
        raise UserError(f"{role}.checkpoint: {path} is not a readable checkpoint: {reason}") from None
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{role}.checkpoint: {path} is not a state dict: save the state dict alone")
    state = {
        key.removeprefix("net."): value for key, value in state.items() if not key.startswith(_TRAINING_PARTS)
    }
    wanted = net.state_dict()
    for key in [*wanted, *state]:
        if key not in state or key not in wanted:
            where = "lacks" if key not in state else "has an unexpected"
            raise UserError(f"{role}.checkpoint: {path} {where} {key}: it belongs to another architecture")
        if state[key].shape != wanted[key].shape:
            raise UserError(
                f"{role}.checkpoint: {key} is {tuple(state[key].shape)} in {path}, {role}.name with data.num_classes "
                f"needs {tuple(wanted[key].shape)}: give the name, kwargs and data.num_classes that it was saved with"
            )
    net.load_state_dict(state)


@torch.no_grad()
def _check_interface(net: nn.Module, name: str, image_size: int, role: str) -> None:
    """One small forward pass: the input size fits, and classifier(embedding) is the model's own output."""
    training, images, same = net.training, torch.zeros(1, 3, image_size, image_size), False
    net.eval()
    try:
        logits = net(images)
        with contextlib.suppress(RuntimeError, TypeError, AttributeError):
            features = net.forward_features(images)
            embedding = net.forward_head(features, pre_logits=True)
            distilled = isinstance(net.get_classifier(), tuple)  # DeiT's: the mean of two classifiers
            same = torch.allclose(
                net.forward_head(features) if distilled else net.get_classifier()(embedding), logits
            )
    except (AssertionError, RuntimeError, TypeError, AttributeError) as error:
        reason = in_one_line(error, 200)
        raise UserError(
            f"{role}: {name} cannot take {image_size} px images (data.image_size): {reason}"
        ) from None
    finally:
        net.train(training)
    if not same:
        raise UserError(
            f"{role}: the output of {name} is not its classifier on its embedding: use another variant"
        )
    if not hasattr(net, "head_hidden_size"):  # timm's word for the embedding's width
        net.head_hidden_size = embedding.shape[1]
