"""The names that other programs import: they outlive every move of modules."""

from __future__ import annotations

import inspect

import pytest

import indistill
from indistill import curriculum, evaluate, losses, order, prune

PUBLIC = {
    losses: "at bce crd cross_entropy dih dist dkd feature hint kd pkt reviewkd rkd sp token vid",
    prune: "PairPlan Plan Writer calibrate filter_importance l1_importance plan published_norm "
    "random_importance top_channels unpruned writers",
    curriculum: "Curriculum ImageSizes Pace Phase Timetable flattened schedule_of",
    order: "SampleOrder",
    evaluate: "accuracy bank_scores check_bank embeddings knn linear_probe precision_at retrieval "
    "retrieval_map similarity",
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_the_public_modules_have_their_names(module):
    own = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and (value.__module__ == module.__name__ or value.__module__.startswith(f"{module.__name__}."))
    }
    assert own == set(PUBLIC[module].split())


def test_the_package_has_its_names():
    assert set(indistill.__all__) == {"Callback", "Config", "Trainer", "UserError", "__version__"}
    assert all(getattr(indistill, name) for name in indistill.__all__)
