"""Packages that only some features need, and the extra of `indistill` that installs each."""

from __future__ import annotations

import importlib.util

from indistill.config.base import UserError

# Extra -> module -> the package that contains it. pyproject.toml has the same packages, with their versions.
EXTRAS = {
    "s3": {"s3fs": "s3fs"},
    "gcs": {"gcsfs": "gcsfs"},
    "hf": {"huggingface_hub": "huggingface-hub", "pyarrow": "pyarrow"},
    "zstd": {"zstandard": "zstandard"},
    "demo": {"sklearn": "scikit-learn"},
    "deepspeed": {"deepspeed": "deepspeed", "transformers": "transformers"},
    "export": {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
}


def need(extra: str, feature: str, module: str | None = None) -> None:
    """Raise UserError if a package of the extra is missing; `feature` names what needs it.

    module: the only one that the feature needs.
    """
    packages = EXTRAS[extra] if module is None else {module: EXTRAS[extra][module]}
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"{feature} needs {', '.join(missing)}: pip install 'indistill[{extra}]', or {' '.join(missing)}"
        )
