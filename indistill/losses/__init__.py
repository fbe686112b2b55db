"""Distillation losses: pure functions of tensors, each a mean over the batch, and one file for each.

Every loss is computed in float32 at least, whatever the autocast state, and leaves gradients open to both
arguments: the caller decides what is frozen. Shapes are never broadcast; a mismatch raises ValueError.
"""

from indistill.config import Inputs, Loss, Shape
from indistill.losses.at_loss import at
from indistill.losses.bce_loss import bce
from indistill.losses.ce_loss import cross_entropy
from indistill.losses.crd_loss import crd
from indistill.losses.dih_loss import dih
from indistill.losses.dist_loss import dist
from indistill.losses.dkd_loss import dkd
from indistill.losses.feature_loss import feature
from indistill.losses.hint_loss import hint
from indistill.losses.kd_loss import kd
from indistill.losses.pkt_loss import Divergence, Kernel, Scale, pkt
from indistill.losses.reviewkd_loss import reviewkd
from indistill.losses.rkd_loss import rkd
from indistill.losses.sp_loss import sp
from indistill.losses.token_loss import token
from indistill.losses.vid_loss import vid

__all__ = [
    "Divergence",
    "Inputs",
    "Kernel",
    "Loss",
    "Scale",
    "Shape",
    "at",
    "bce",
    "crd",
    "cross_entropy",
    "dih",
    "dist",
    "dkd",
    "feature",
    "hint",
    "kd",
    "pkt",
    "reviewkd",
    "rkd",
    "sp",
    "token",
    "vid",
]
