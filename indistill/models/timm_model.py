"""Create timm models, load their weights, and check that they have what training needs."""

from __future__ import annotations

import contextlib
import difflib
import os
import pickle  # nosec B403  # only for the type of its errors
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.layers import set_reentrant_ckpt
from timm.models import load_state_dict
from torch import Tensor, nn

from indistill import config
from indistill.config import UserError, in_one_line, printable
from indistill.config.files import denied
from indistill.config.ranks import Ranks
from indistill.config.run_dir import RunDir
from indistill.models.weights import diverged, misfit, renamed

# Arguments of timm.create_model that name files or say which weights are loaded, and how many of them.
_OTHER_WEIGHTS = {
    *("checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("pretrained_strict", "pretrained_filter_fn", "pretrained_model_args"),
}
_TRAINING_PARTS = ("adapters.", "projectors.")  # of Network: in checkpoints, but not the student's own


class TimmModel(nn.Module):
    """The part of timm's model interface that this package uses, for type checkers.

    timm's models share no base class but nn.Module: none is an instance of this class, which defines nothing
    at run time.
    """

    num_classes: int
    head_hidden_size: int  # width D of the embedding
    pretrained_cfg: dict[str, Any]
    feature_info: Any  # a dict per stage (module, num_chs, reduction), or an object with these as `info`
    forward_features: Callable[[Tensor], Tensor]
    forward_intermediates: Callable[..., Any]  # maps [B, C, H, W] per stage; or the final features, and these
    forward_head: Callable[..., Any]  # logits [B, K], a pair while DeiT trains; or embedding
    get_classifier: Callable[[], Any]  # a module; DeiT has two
    plain_head: bool  # whether the logits are a linear classifier of the embedding; set by `create`
    # Only some models have these.
    set_distilled_training: Callable[[bool], None]
    set_input_size: Callable[..., None]
    set_grad_checkpointing: Callable[[bool], None]  # which may refuse with an AssertionError
    group_matcher: Callable[..., Any]
    no_weight_decay: Callable[[], set[str]]


def timm_model(net: nn.Module) -> TimmModel:
    """Return `net` itself, typed: public functions take the nn.Module that timm's own functions return."""
    return cast(TimmModel, net)  # timm's models share no base class that could be tested


class NoWeights(UserError):
    """A model's pretrained weights could not be loaded; `role` is student, teacher or eval."""

    def __init__(self, message: str, role: str) -> None:
        super().__init__(message)
        self.role = role
        self.teacher = ""  # which of several teachers, by what it is called


def create(section: config.Model, num_classes: int, image_size: int, role: str) -> TimmModel:
    """Create the bare timm model that a `student` or `teacher` section describes.

    It has no classifier if the section says so, if `num_classes` is 0, or if its pretrained weights have
    none. Raises UserError for
    an unknown name, weights that cannot be loaded or do not fit, a head of another size than `num_classes`,
    and a head that does not follow timm's interface. No weight is left random without an error.
    """
    check_name(section, role)
    # Given another number of classes, timm would replace a pretrained head by a random one.
    kwargs = {**section.kwargs} if section.pretrained else {"num_classes": num_classes, **section.kwargs}
    if section.num_classes == 0 or not num_classes:
        kwargs["num_classes"] = 0
    net = _create(section, kwargs, role)
    if net.num_classes not in (0, num_classes):
        raise UserError(
            f"{role}: the head of {section.name} has {net.num_classes} classes, data.num_classes is "
            f"{num_classes}: use weights trained for this data set"
        )
    if role == "teacher" and section.pretrained and "num_classes" in section.kwargs:
        raise UserError(
            "teacher.kwargs.num_classes: timm would replace the head of another size by a random one: remove "
            "it, and use weights trained for this data set"
        )
    if section.checkpoint:
        _load_weights(net, section.checkpoint, role)
    if section.checkpoint or section.pretrained:
        _check_finite(net, section, role)
    side = fit_input(net, section, image_size)
    _check_interface(net, section.name, side=side, image_size=image_size, role=role)
    return net


def fit_input(net: TimmModel, section: config.Model, image_size: int) -> int:
    """Make a network take images of its own `input_side`, and return that.

    timm resamples position embeddings, and changes windows. Networks without such a method take every size,
    and so do those with `dynamic_img_size`.
    """
    side = input_side(net, section, image_size)
    wanted = side != image_size or (isinstance(section, config.Teacher) and section.image_size is not None)
    if wanted and hasattr(net, "set_input_size") and not getattr(net, "dynamic_img_size", False):
        # `_check_interface` says better why a network cannot take a size.
        with contextlib.suppress(AssertionError, RuntimeError, ValueError):
            net.set_input_size(img_size=(side, side))
    return side


def input_side(net: TimmModel, section: config.Model, image_size: int) -> int:
    """Return the side of a network's input in pixels; `image_size` is the student's, and the default.

    Raises UserError for a teacher's that is not of whole patches.
    """
    return own_side(net, section) or image_size


def own_side(net: TimmModel, section: config.Model) -> int | None:
    """Return the side of a teacher's input where it does not follow the student's, in pixels.

    Raises UserError for one that is not of whole patches.
    """
    if not isinstance(section, config.Teacher):
        return None
    patch = _patch(net)
    if section.image_size is not None:
        if section.image_size % patch:
            fitting = max(section.image_size // patch, 1) * patch
            raise UserError(
                f"teacher.image_size: {section.image_size} is no multiple of {patch}, the patch size of "
                f"{section.name}: set {fitting} or {fitting + patch}"
            )
        return section.image_size
    own = section.kwargs.get("img_size") or ((net.pretrained_cfg or {}).get("input_size") or [None])[-1]
    if net.num_classes or not isinstance(own, int):
        return None
    return max(own // patch, 1) * patch


def _patch(net: TimmModel) -> int:
    """The side of a vision transformer's patches in pixels; 1 for other networks."""
    size = getattr(getattr(net, "patch_embed", None), "patch_size", 1)
    return max(size) if isinstance(size, (tuple, list)) else size


def checkpoint_gradients(net: TimmModel, name: str) -> None:
    """Make a student compute its blocks again in the backward pass, instead of keeping what is in them.

    Raises UserError if timm cannot do so with this network.
    """
    # The reentrant kind hides parameters from DDP, from ZeRO and from the estimates.
    set_reentrant_ckpt(False)
    try:
        net.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise UserError(
            f"grad_checkpointing: timm has none for {name}: remove it, or choose another student.name"
        ) from None


def check_name(section: config.Model, role: str) -> None:
    """Raise UserError for a name that timm does not know, and for a folder that `export` did not write."""
    kind, _, source = section.name.partition(":")
    if kind == "local-dir":
        if not Path(source, "config.json").is_file():
            reason = "has no config.json" if os.path.isdir(source) else "is no folder"
            raise UserError(
                f"{role}.name: {source} {reason}: name a folder that `indistill export --format timm` wrote"
            )
    elif kind != "hf-hub" and not timm.is_model(section.name):
        message = f"{role}.name: timm has no model {section.name!r}"
        close = difflib.get_close_matches(section.name, timm.list_models(), n=3)
        if Path(section.name, "config.json").is_file():
            message += f": for the folder of an export, name local-dir:{section.name}"
        elif close:
            message += f"; near: {', '.join(close)}"
        raise UserError(message)


def build(section: config.Model, kwargs: dict[str, Any], role: str, *, pretrained: bool = False) -> nn.Module:
    """Call timm.create_model. Raises UserError for arguments that would name files or other weights."""
    for key in sorted(_OTHER_WEIGHTS & kwargs.keys()):
        raise UserError(
            f"{role}.kwargs.{key}: would load other weights, or only some: give {role}.checkpoint instead"
        )
    return timm.create_model(section.name, pretrained=pretrained, **kwargs)


def _create(section: config.Model, kwargs: dict[str, Any], role: str) -> TimmModel:
    try:
        net = build(section, kwargs, role, pretrained=section.pretrained)
    except UserError:
        raise
    except Exception as error:  # timm, the hub client and the network each raise their own
        reason = in_one_line(error, 300)
        message = f"{role}: timm could not create {section.name}: {reason}"
        if not section.pretrained:
            raise UserError(message) from None
        if role != "eval":
            message += f" (for weights in a file: {role}.pretrained: false, {role}.checkpoint: FILE)"
        raise NoWeights(message, role) from None
    if not hasattr(net, "num_classes"):  # as with features_only
        raise UserError(
            f"{role}.kwargs: with {', '.join(section.kwargs)} {section.name} gives maps and has no "
            "classifier: remove them (maps need no argument)"
        )
    return timm_model(net)


def _load_weights(net: TimmModel, path: str, role: str) -> None:
    read, notes = _read_state_dict(path, role)
    own = {
        key.removeprefix("net."): value for key, value in read.items() if not key.startswith(_TRAINING_PARTS)
    }
    expected = net.state_dict()
    if not net.num_classes:
        own = {key: value for key, value in own.items() if not key.startswith(_classifier(net))}
    try:
        state, more_notes = renamed(own, expected)
    except UserError as error:
        raise UserError(f"{role}.checkpoint: {path} {error}") from None
    for key in [*expected, *state]:
        if key not in state or key not in expected:
            where = "lacks" if key not in state else "has an unexpected"
            raise UserError(f"{role}.checkpoint: {path} {where} {key}: it belongs to another architecture")
        if state[key].shape != expected[key].shape:
            raise UserError(
                f"{role}.checkpoint: {key} is {tuple(state[key].shape)} in {path}, {role}.name with "
                f"data.num_classes needs {tuple(expected[key].shape)}: give the name, kwargs and "
                "data.num_classes that it was saved with"
            )
    if problem := misfit(state, expected):
        raise UserError(f"{role}.checkpoint: {path} {problem}: save the state dict of the model itself")
    net.load_state_dict(state)
    if (notes := notes + more_notes) and Ranks.from_environment().is_main_process:
        how = "; ".join(notes)
        print(printable(f"indistill: {role}.checkpoint: {path} is loaded {how}"), file=sys.stderr, flush=True)


def _classifier(net: TimmModel) -> tuple[str, ...]:
    """How the names of a classifier's weights begin, by timm's record: DeiT has two classifiers."""
    names = (net.pretrained_cfg or {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _check_finite(net: nn.Module, section: config.Model, role: str) -> None:
    """Raise UserError for weights of a training that diverged."""
    key = "checkpoint" if section.checkpoint else "name"
    if (name := diverged(net)) is not None:
        raise UserError(
            f"{role}.{key}: {section.checkpoint or section.name} has NaN or infinity in {name}: its training "
            "has diverged, use other weights"
        )


def check_file(key: str, path: str) -> None:
    """Raise UserError if there is no file of weights at `path`, the value of the config's `key`."""
    if os.path.isfile(path):
        return
    if not os.path.isdir(path):
        reason = "permission denied for" if denied(path) else "no file"
        raise UserError(f"{key}: {reason} {path}")
    role, _, kind = key.partition(".")
    files = RunDir(Path(path))
    remedy = f"name a file, such as {files.heads if kind == 'heads' else files.student} of a finished run"
    if kind == "checkpoint" and Path(path, "config.json").is_file():
        remedy = f"for an export, set {role}.name=local-dir:{path} {role}.pretrained=true {key}=null"
    raise UserError(f"{key}: {path} is a folder: {remedy}")


def _read_state_dict(path: str, role: str) -> tuple[dict[str, Tensor], list[str]]:
    """Read a state dict, alone in its file or one entry of it; return also how, as an end of "loaded ..."."""
    check_file(f"{role}.checkpoint", path)
    try:
        state = load_state_dict(path, weights_only=True)
    except Exception as error:  # a damaged file fails in pickle, zip or safetensors
        reason = in_one_line(error, 200)
        if isinstance(error.__cause__, pickle.UnpicklingError):
            reason = "damaged, or it holds objects other than tensors, which may run code"
            reason += ": save the state dict alone"
        raise UserError(f"{role}.checkpoint: {path} is not a readable checkpoint: {reason}") from None
    if _is_state_dict(state):
        return state, []
    entries = [key for key, value in state.items() if _is_state_dict(value)]
    if len(entries) > 1:
        raise UserError(
            f"{role}.checkpoint: {path} holds several state dicts ({', '.join(entries)}): save one alone"
        )
    if not entries:
        raise UserError(f"{role}.checkpoint: {path} is not a state dict: save the state dict alone")
    return state[entries[0]], [f"from its entry {entries[0]}"]


def _is_state_dict(content: object) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    )


@torch.no_grad()
def _check_interface(net: TimmModel, name: str, *, side: int, image_size: int, role: str) -> None:
    """Run a small forward pass: the input size must fit, and classifier(embedding) be the model's output."""
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    same = False
    training = net.training
    net.eval()
    try:
        logits = net(images)
        finite = bool(logits.isfinite().all())
        with contextlib.suppress(RuntimeError, TypeError, AttributeError):
            features = net.forward_features(images)
            embedding = net.forward_head(features, pre_logits=True)
            net.plain_head = _has_plain_head(net, features, logits, role)
            own = net.get_classifier()(embedding) if net.plain_head else net.forward_head(features)
            same = embedding.dim() == 2 and torch.allclose(own, logits)
    except (AssertionError, RuntimeError, TypeError, AttributeError) as error:
        reason = in_one_line(error, 200)
        key = "data.image_size" if side == image_size else "teacher.image_size"
        raise UserError(f"{role}: {name} cannot take {side} px images ({key}): {reason}") from None
    finally:
        net.train(training)
    if not finite:
        raise UserError(
            f"{role}: the output of {name} for random pixels is not finite: its weights have diverged, or "
            "are damaged: use others"
        )
    if not same:
        raise UserError(
            f"{role}: the output of {name} is not its classifier on its embedding: use another variant"
        )
    if not hasattr(net, "head_hidden_size"):  # timm's name for the width of the embedding
        net.head_hidden_size = embedding.shape[1]


def _has_plain_head(net: TimmModel, features: Any, logits: Tensor, role: str) -> bool:
    """Whether the logits are a linear classifier of the embedding: of a student, in training too.

    DeiT has two classifiers, whose mean is the output, and BiT's is a convolution. Before MViT's there is a
    dropout, and before SHViT's a batch norm.
    """
    classifier = net.get_classifier()

    def of_embedding() -> Tensor:
        return classifier(net.forward_head(features, pre_logits=True))

    if not isinstance(classifier, nn.Linear) or not torch.allclose(of_embedding(), logits):
        return False
    if role != "student":
        return True
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    net.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = net.forward_head(features)
        torch.manual_seed(0)
        plain = torch.equal(of_embedding(), whole)  # also where they are tiny
    for buffer, before in buffers:
        buffer.copy_(before)
    net.eval()
    return plain
