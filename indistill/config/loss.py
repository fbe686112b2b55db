"""The sections of `kd.losses` and of the warm-up's loss: one class per loss."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from indistill.config.base import Probability, Section


# Each loss says what it reads of the student. docs/losses.md has the published settings beside these defaults.
class CrossEntropy(Section):
    reads: ClassVar[set[str]] = {"logits"}
    name: Literal["ce"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of the label spread over all classes


class KDLoss(Section):
    reads: ClassVar[set[str]] = {"logits"}
    name: Literal["kd"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    temperature: PositiveFloat = 4.0  # of both softmaxes
    standardize: bool = False  # logit standardisation (arXiv 2403.01427)


class DISTLoss(Section):
    reads: ClassVar[set[str]] = {"logits"}
    name: Literal["dist"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    beta: float = 1.0  # of the relations within a sample
    gamma: float = 1.0  # of those within a class
    temperature: PositiveFloat = 1.0  # of both softmaxes


class DKDLoss(Section):
    reads: ClassVar[set[str]] = {"logits"}
    name: Literal["dkd"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    alpha: float = 1.0  # of the target class
    beta: float = 8.0  # of the others
    temperature: PositiveFloat = 4.0  # of both softmaxes


class CohortLoss(Section):
    """Co-teaching by the teacher and its intermediate classifier heads: needs `teacher.heads`."""

    reads: ClassVar[set[str]] = {"logits"}
    name: Literal["dih"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    alpha: Probability = 0.1  # of the teaching, beside cross-entropy
    temperature: PositiveFloat = 5.0  # of all softmaxes
    weights: list[float] | None = None  # of the teacher, then of each head, shallow to deep; None: 1 each


class TokenLoss(Section):
    """Distillation token of a student such as deit_tiny_distilled_patch16_224; `ce` then trains its class token."""

    reads: ClassVar[set[str]] = {"logits", "token"}
    name: Literal["token"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    mode: Literal["hard", "soft"] = "hard"  # the teacher's class as a label, or its softened probabilities
    temperature: PositiveFloat = 1.0  # for soft


Kernel = Literal["cosine", "student_t", "rbf", "combined"]
Divergence = Literal["kl", "jeffreys"]


class PKTLoss(Section):
    reads: ClassVar[set[str]] = {"embedding"}
    name: Literal["pkt"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    kernel: Kernel = "combined"  # how alike two samples are; combined: the sum of cosine and student_t
    divergence: Divergence = "jeffreys"  # of the two networks' similarities; jeffreys: kl in both directions
    # batch: times the number of samples that are compared; without it, gradients shrink as that number grows.
    scale: Literal["none", "batch"] = "none"


class InformationFlowLoss(Section):
    """PKT on the embedding, and on every pair of `kd.pairs` with weight init * decay^epoch."""

    reads: ClassVar[set[str]] = {"embedding", "features"}
    name: Literal["information_flow"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    init: Annotated[float, Field(ge=0)] = 100.0  # weight of each pair at first, beside 1 for the embedding
    decay: Annotated[float, Field(ge=0, le=1)] = 0.7  # by which that weight is multiplied every epoch
    kernel: Kernel = "combined"  # how alike two samples are; combined: the sum of cosine and student_t
    divergence: Divergence = "jeffreys"  # of the two networks' similarities; jeffreys: kl in both directions
    # batch: times the number of samples that are compared; without it, gradients shrink as that number grows.
    scale: Literal["none", "batch"] = "none"


class RKDLoss(Section):
    reads: ClassVar[set[str]] = {"embedding"}
    name: Literal["rkd"]  # which loss this is
    weight: float = 1.0  # in the sum of losses
    distance_weight: float = 25.0  # of the distances of two samples
    angle_weight: float = 50.0  # of the angles of three


class CRDLoss(Section):
    reads: ClassVar[set[str]] = {"embedding"}
    name: Literal["crd"]  # which loss this is
    weight: float = 0.8  # in the sum of losses
    dim: PositiveInt = 128  # of the space where student and teacher meet
    temperature: PositiveFloat = 0.07  # that inner products are divided by


class SPLoss(Section):
    reads: ClassVar[set[str]] = {"features"}
    name: Literal["sp"]  # which loss this is
    weight: float = 3000.0  # in the sum of losses


class ATLoss(Section):
    reads: ClassVar[set[str]] = {"features"}
    name: Literal["at"]  # which loss this is
    weight: float = 1000.0  # in the sum of losses


class MapLoss(Section):
    """On every pair of `kd.pairs`, through trained layers (layers.py) from the student's maps to the teacher's."""

    reads: ClassVar[set[str]] = {"features"}
    name: Literal["hint", "vid", "reviewkd"]  # which loss this is
    weight: float = 1.0  # in the sum of losses


Loss = Annotated[
    CrossEntropy
    | KDLoss
    | DISTLoss
    | DKDLoss
    | CohortLoss
    | TokenLoss
    | PKTLoss
    | InformationFlowLoss
    | RKDLoss
    | CRDLoss
    | SPLoss
    | ATLoss
    | MapLoss,
    Field(discriminator="name"),
]
