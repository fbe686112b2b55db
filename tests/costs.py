"""Small networks and runs whose cost is counted by hand."""

from __future__ import annotations

from indistill import config

# Parameters of the small student, with biases and norms.
WEIGHTS = 8 * 27 + 16 * 72 + 32 * 144 + 128 * 64 + 64 * 10 + 3 * (8 + 16 + 32) + 64 + 10


def small(views=None, workers=0, in_memory=False, **sections):
    """100 epochs, 20 of them the warm-up of one pair; `sections` replace those of the config."""
    tree = {
        "run_dir": "run",
        "duration": "100 epochs",
        "data": {
            "train": "x.tar",
            "num_classes": 10,
            "global_batch": 8,
            "workers": workers,
            "in_memory": in_memory,
        },
        "student": {"name": "cnn32_student"},
        "teacher": {"name": "cnn32_auxiliary", "random": True},
        "warmup": {"durations": ["20 epochs"]},
        "kd": {"losses": [{"name": "ce"}, {"name": "kd"}]},
        "optimizer": {"lr": 0.1},
    }
    tree["data"]["augment"] = {"views": views}
    return config.parse(tree, "test").model_copy(update=sections)
