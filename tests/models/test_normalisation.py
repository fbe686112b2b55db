"""The normalisation that a network's record states."""

from __future__ import annotations

import pytest
import timm

from indistill.config import Model, UserError
from indistill.models.network import normalisation

GOOD = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 1, 0.3]}


def test_the_record_decides_unless_the_config_does():
    net = timm.create_model("test_vit")
    net.pretrained_cfg = GOOD
    assert normalisation(net, Model(name="x"), "student") == (GOOD["mean"], GOOD["std"])
    section = Model(name="x", mean=(0, 0, 0), std=(1, 1, 1))
    assert normalisation(net, section, "student") == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize("key", ["mean", "std"])
@pytest.mark.parametrize(
    "values",
    [10**400, float("nan"), float("inf"), "0.5", None, [0.5], {}],
    ids=["huge", "nan", "inf", "text", "nothing", "list", "mapping"],
)
def test_what_is_no_normalisation(key, values):
    net = timm.create_model("test_vit")
    net.pretrained_cfg = {**GOOD, key: [0.5, values, 0.5]}
    with pytest.raises(UserError, match=r"^student: the normalisation of x is .*set student\.mean"):
        normalisation(net, Model(name="x"), "student")


@pytest.mark.parametrize("std", [0.0, -0.5])
def test_a_deviation_is_positive(std):
    net = timm.create_model("test_vit")
    net.pretrained_cfg = {**GOOD, "std": [0.5, std, 0.5]}
    with pytest.raises(UserError, match="not three positive numbers"):
        normalisation(net, Model(name="x"), "student")
