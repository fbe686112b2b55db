"""`targets: auto`: what `indistill plan` finds cheaper to read is stored and read, all else is live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from indistill import config
from indistill.commands.targets import write
from indistill.config import UserError
from indistill.config.files import read_lines
from indistill.models.network import Network
from indistill.targets.manifest import manifest_exists
from indistill.training.loop import train

# A disk too slow for maps (7 kB) to be worth reading and fast enough for logits (44 bytes), beside a slow
# device.
MACHINE = {
    "flops_per_second": 1e9,
    "devices_per_node": 1,
    "decode_images_per_second": 1e9,
    "read_bytes_per_second": 1e5,
}


@pytest.fixture
def auto(tree, tmp_path):
    """One view, of which KD sees every image almost twice."""
    tree["data"]["augment"]["views"] = 1
    tree["targets"] = {"source": "auto", "dir": str(tmp_path / "targets")}
    tree["machine"] = MACHINE
    tree["evaluate"] = {"similarity_samples": 0}
    return tree


def run(tree: dict[str, Any], run_dir: Path | None = None, source: str = "auto") -> list[float]:
    tree = tree | {"targets": tree["targets"] | {"source": source}}
    settings = config.parse(tree | {"run_dir": str(run_dir or tree["run_dir"])}, "test")
    train(settings)
    return [line["loss"] for line in read_lines(Path(settings.run_dir) / "metrics.jsonl") if "loss" in line]


def test_kd_is_stored_and_the_warmup_live(auto, tmp_path, monkeypatch, capsys):
    expected = run(auto, tmp_path / "live", "live")
    manifest = write.write(config.parse(auto, "test"))
    assert set(manifest.fields) == {"logits"}
    passes = []
    normalise = Network.normalise

    def counting(network, images):
        passes.append(len(images)) if torch.is_inference_mode_enabled() else None
        return normalise(network, images)

    monkeypatch.setattr(Network, "normalise", counting)
    assert run(auto) == expected
    assert passes.count(32) == 13  # the steps of the warm-up; the others are of the measuring
    assert "indistill: targets: auto: stored in kd\n" in capsys.readouterr().out


def test_without_a_store_all_is_live_and_told(auto, tmp_path, capsys):
    assert run(auto) == run(auto, tmp_path / "live", "live")
    told = capsys.readouterr().out
    assert "indistill: targets: auto: live: `indistill targets CONFIG` would make the run shorter\n" in told


def test_rounded_targets_do_not_come_in_between(auto):
    """A run that began live does not go on with the largest of the logits only, nor the other way round."""
    auto["targets"]["top_k"] = 3
    auto["checkpoint"] = {"every_steps": 6}
    run(auto)
    write.write(config.parse(auto, "test"))
    with pytest.raises(UserError, match="saved with another teacher"):
        run(auto)


def test_what_is_never_cheaper_is_not_stored(auto):
    auto["machine"] = MACHINE | {"flops_per_second": 1e15}
    with pytest.raises(UserError, match="targets: auto: live targets are cheaper in every phase"):
        write.write(config.parse(auto, "test"))
    assert not manifest_exists(auto["targets"]["dir"])


def test_another_plan_is_refused(auto):
    write.write(config.parse(auto | {"targets": auto["targets"] | {"source": "cached"}}, "test"))
    auto["warmup"]["prune"] = {"criterion": "l2"}
    with pytest.raises(UserError, match=r"warmup\.prune\.criterion"):
        run(auto)
