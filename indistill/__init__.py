"""indistill: knowledge distillation at cluster scale."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from indistill.commands.trainer import Trainer
    from indistill.config import Config, UserError
    from indistill.training.callbacks import Callback

__version__ = "0.1.0"
__all__ = ["Callback", "Config", "Trainer", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `indistill --help` does not wait for what it imports."""
    if name == "Trainer":
        from indistill.commands.trainer import Trainer

        return Trainer
    if name == "Callback":
        from indistill.training.callbacks import Callback

        return Callback
    if name in ("Config", "UserError"):
        from indistill import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
