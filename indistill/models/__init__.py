"""Timm models as a `Network`: stages, embedding and logits in one forward pass."""

from indistill.models import cnn32  # noqa: F401  registers the small networks with timm
