"""Targets computed once: every format against a reference, runs from what is stored against runs with the
teacher.
"""

from __future__ import annotations

import copy
import functools
import http.server
import re
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import EPS, in_float64, pack_images, run_ranks, train_until

from indistill import config, prune
from indistill.commands import cli
from indistill.commands.targets import verify, write
from indistill.config import UserError
from indistill.config.files import read_lines, sha256
from indistill.config.read import apply_override
from indistill.curriculum import Phase
from indistill.data import packing, shards
from indistill.models import outputs, timm_model
from indistill.models.cnn32 import CNN32
from indistill.models.network import Network, save_network
from indistill.targets import live
from indistill.targets import records as targets_records
from indistill.targets.live import LiveTargets
from indistill.targets.manifest import Manifest, decisive_config, load_manifest
from indistill.targets.reader import Reader
from indistill.targets.records import Field
from indistill.targets.stored import CachedTargets
from indistill.training import loop

LOSSES = [{"name": "ce"}, {"name": "kd"}, {"name": "pkt"}, {"name": "at"}, {"name": "hint"}]
FIELDS = {"pair1", "pair2", "pair3", "stage0", "stage1", "stage2", "embedding", "logits"}


@pytest.fixture
def stored(tree, tmp_path) -> dict[str, Any]:
    """A config whose losses read every kind of field; each image is seen twice in each of its two views."""
    tree["kd"]["losses"] = LOSSES
    tree["data"]["augment"]["views"] = 2
    tree["targets"] = {"dir": str(tmp_path / "targets")}
    tree["evaluate"] = {"similarity_samples": 0}
    return tree


def with_(tree: dict[str, Any], *overrides: str) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    for override in overrides:
        apply_override(tree, override)
    return tree


def compute(tree: dict[str, Any]) -> Manifest:
    return write.write(config.parse(tree, "test"))


def run(tree: dict[str, Any], run_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    """The logged terms of each step."""
    tree = with_(tree, f"run_dir={run_dir}", *overrides)
    loop.train(config.parse(tree, "test"))
    return terms(run_dir)


def terms(run_dir: Path) -> list[dict[str, Any]]:
    timed = ("images_per_second", "data_wait_fraction")
    lines = read_lines(Path(run_dir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if "loss" in line]


def refusal(tree: dict[str, Any], *overrides: str) -> str:
    fresh = f"run_dir={tempfile.mkdtemp(dir=Path(tree['run_dir']).parent)}"
    with pytest.raises(UserError) as caught:
        loop.train(config.parse(with_(tree, fresh, "targets.source=cached", *overrides), "test"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(tree: dict[str, Any]) -> dict[str, bytes]:
    root = Path(tree["targets"]["dir"])
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.bin")}


def no_teacher(monkeypatch) -> None:
    create = timm_model.create

    def student_only(section, classes, size, role):
        assert role == "student"
        return create(section, classes, size, role)

    monkeypatch.setattr(timm_model, "create", student_only)


# --- formats ------------------------------------------------------------------------------------------------


def there_and_back(field: Field, tensor: torch.Tensor) -> torch.Tensor:
    records = field.encode(tensor)
    rows = targets_records.rows_of(records)
    assert rows.shape == (len(tensor), field.record.itemsize)
    assert targets_records.intact(rows).all()
    return field.decode(torch.from_numpy(rows))


def maps(seed=0, shape=(6, 5, 4, 3)) -> torch.Tensor:
    values = (
        torch.randn(shape, generator=torch.manual_seed(seed)) * torch.logspace(-6, 4, shape[1])[:, None, None]
    )
    values[1, 2] = 0  # a channel that is silent
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [1, 6])
def test_float32_gives_back_what_the_teacher_gave(dtype, layout, samples):
    values = maps()[:samples].to(dtype).contiguous(memory_format=layout)
    back = there_and_back(targets_records.describe("pair1", values, config.Targets()), values)
    assert back.dtype == dtype
    assert torch.equal(back, values)
    assert back.is_contiguous(memory_format=layout)


def test_patch_tokens_keep_the_layout_of_live_ones():
    """They are views between class tokens; another layout changes the last bits of a convolution."""
    tokens = torch.randn(3, 1 + 16, 8)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))  # [B, C, H, W]
    field = targets_records.describe("tokens", tokens, config.Targets())
    back = there_and_back(field, tokens)
    assert torch.equal(back, tokens)
    assert back.stride() == tokens.clone().stride()


def test_bf16_rounds_to_eight_bits():
    values = maps()
    field = targets_records.describe("stage2", values, config.Targets(features="bf16"))
    back = there_and_back(field, values)
    bits = values.numpy().view(np.uint32).astype(np.uint64)
    nearest = (
        ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    )  # ties to even
    assert np.array_equal(back.numpy(), nearest)
    assert field.record.itemsize == 2 * 60 + 4


@pytest.mark.portable
def test_int8_is_within_half_a_step_of_its_channel():
    values = maps()
    field = targets_records.describe("pair2", values, config.Targets(features="int8"))
    back = there_and_back(field, values).double().numpy()
    exact = values.double().numpy()
    step = np.abs(exact).max(axis=(2, 3), keepdims=True) / 127
    # Of at most 127 steps, each taken with two roundings in float32.
    assert (np.abs(back - exact) <= step * (0.5 + 127 * 2 * EPS)).all()
    assert np.abs(back - exact).max() > 0
    assert (back[1, 2] == 0).all()
    assert field.record.itemsize == 60 + 4 * 5 + 4


@pytest.mark.portable
def test_top_k_of_all_classes_is_the_softmax():
    logits = 20 * torch.randn(7, 12, generator=torch.manual_seed(3))
    back = (
        there_and_back(targets_records.describe("logits", logits, config.Targets(top_k=12)), logits)
        .double()
        .numpy()
    )
    exact = logits.double().numpy()
    log_p = (
        exact
        - np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1, keepdims=True))
        - exact.max(1, keepdims=True)
    )
    assert_log_of_rounded(back, np.maximum(log_p, np.log(np.finfo(np.float32).tiny)))


def assert_log_of_rounded(found: np.ndarray, exact: np.ndarray) -> None:
    """Two roundings to float32 of the probability, which are absolute for its logarithm, and then one of
    that.
    """
    assert (np.abs(found - exact) <= EPS * (1 + np.abs(exact))).all()


@pytest.mark.portable
def test_top_k_spreads_the_tail_over_the_others():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, 0.5]])
    field = targets_records.describe("head1", logits, config.Targets(top_k=2))
    p = np.exp([2.0, 0.0, 1.0, -1.0, 0.5])
    p /= p.sum()
    rest = (p[1] + p[3] + p[4]) / 3
    back = there_and_back(field, logits)
    assert_log_of_rounded(back.double().numpy(), np.log([[p[0], rest, p[2], rest, rest]]))
    assert field.record.itemsize == 2 * 4 + 2 * 2 + 4 + 4


def test_more_classes_than_two_bytes_can_tell():
    logits = torch.zeros(2, 70_000)
    logits[0, 69_999], logits[1, 40_000] = 9, 9
    field = targets_records.describe("logits", logits, config.Targets(top_k=1))
    assert there_and_back(field, logits).argmax(1).tolist() == [69_999, 40_000]


def test_what_is_not_a_number_stays_so():
    values = maps()
    values[0, 1, 0, 0], values[2, 3, 1, 1] = torch.nan, torch.inf
    for kind in ("float32", "bf16", "int8"):
        back = there_and_back(
            targets_records.describe("pair1", values, config.Targets(features=kind)), values
        )
        assert not back[0].isfinite().all()
        assert not back[2].isfinite().all()
        assert back[1].isfinite().all()


def test_an_embedding_is_stored_as_it_is():
    lossy = config.Targets(features="int8", top_k=1)
    assert targets_records.describe("embedding", torch.zeros(2, 8), lossy).format == "float32"


def test_zeros_are_no_record():
    field = targets_records.describe("logits", torch.zeros(2, 8), config.Targets())
    assert not targets_records.intact(np.zeros((1, field.record.itemsize), np.uint8)).any()


# --- training from what is stored ---------------------------------------------------------------------------


def test_a_run_without_its_teacher_is_the_run_with_it(stored, tmp_path, monkeypatch):
    live = run(stored, tmp_path / "live")
    manifest = compute(stored)
    assert set(manifest.fields) == FIELDS
    assert prune.Plan.read(tmp_path / "live" / "prune_plan.json") == manifest.pruning()
    with monkeypatch.context() as patch:
        no_teacher(patch)
        cached = run(stored, tmp_path / "cached", "targets.source=cached")
    assert {name for line in live for name in line} >= {"mse_pair1", "mse_pair3", "kd", "pkt", "at", "hint"}
    assert cached == live
    students = [tmp_path / name / "student.safetensors" for name in ("live", "cached")]
    weights = {sha256(student) for student in students}
    assert len(weights) == 1
    assert prune.Plan.read(tmp_path / "cached" / "prune_plan.json") == manifest.pruning()

    for step in (6, 17):  # an interrupted live run goes on from stored targets, in the warm-up and in KD
        mixed = with_(stored, f"run_dir={tmp_path}/mixed-{step}")
        train_until(mixed, step)
        train_until(with_(mixed, "targets.source=cached"))
        assert terms(tmp_path / f"mixed-{step}") == live


@pytest.mark.portable
@pytest.mark.parametrize("lossy", ["targets.features=bf16", "targets.features=int8", "targets.top_k=5"])
def test_rounded_targets_are_the_live_ones_rounded(stored, tmp_path, monkeypatch, lossy):
    live = run(stored, tmp_path / "live", lossy)
    compute(with_(stored, lossy))
    cached = run(stored, tmp_path / "cached", lossy, "targets.source=cached")
    section, call = config.parse(with_(stored, lossy), "test").targets, LiveTargets.__call__

    def rounded(name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        return (
            None
            if tensor is None
            else there_and_back(targets_records.describe(name, tensor, section), tensor)
        )

    def rounding_call(*arguments):
        features, embedding, logits, cohort, tokens, _ = call(*arguments)
        assert not cohort
        assert tokens is None
        maps = tuple(rounded("pair1", feature) for feature in features)
        return outputs.Targets(maps, rounded("embedding", embedding), rounded("logits", logits))

    monkeypatch.setattr(LiveTargets, "__call__", rounding_call)
    assert cached == run(stored, tmp_path / "rounded", lossy)
    assert cached != live


def test_pooled_maps_teach_the_same_live_and_stored(stored, tmp_path):
    pool = ("targets.pool=3", "kd.losses=[{name: ce}, {name: at}]")
    live = run(stored, tmp_path / "live", *pool)
    manifest = compute(with_(stored, *pool))
    assert manifest.fields["pair1"].shape == (8, 3, 3)
    assert manifest.fields["stage2"].shape == (64, 2, 2)
    assert run(stored, tmp_path / "cached", "targets.source=cached", *pool) == live
    assert live[0]["loss"] != run(stored, tmp_path / "whole", pool[1], "duration=13 steps")[0]["loss"]


def test_the_loaders_workers_read_along(stored, tmp_path):
    live = run(stored, tmp_path / "live", "duration=15 steps")
    compute(stored)
    workers = ("data.in_memory=false", "data.workers=2", "duration=15 steps", "targets.source=cached")
    assert run(stored, tmp_path / "cached", *workers) == live


def test_remote_targets_come_through_the_shard_cache(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    live = run(stored, tmp_path / "live", "duration=15 steps")
    compute(stored)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=stored["targets"]["dir"])
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    remote = (
        "duration=15 steps",
        "targets.source=cached",
        f"targets.dir={url}",
        f"data.cache_dir={tmp_path}/cache",
    )
    assert run(stored, tmp_path / "cached", *remote) == live
    server.shutdown()
    server.server_close()
    fetched = [path for path in asked if path.endswith(".bin")]
    assert len(fetched) == len(set(fetched))
    # Two steps of KD, within the third epoch: its view alone.
    assert {path.split("/")[1] for path in fetched if "logits" in path} == {"view-000"}
    assert "/view-001/pair3/shard-00000.bin" not in fetched or "/view-000/pair3/shard-00000.bin" in fetched


def test_a_sample_that_cannot_be_decoded_has_no_record(stored, tmp_path):
    folder = tmp_path / "bad"
    pack_images(folder, "whole", samples=64, per_shard=64, seed=1)
    samples = [
        (sample.key, b"no image" if i in (5, 40) else sample.image, "png", sample.label)
        for i, sample in enumerate(shards.ShardSet(str(folder / "whole-*.tar")).iterate())
    ]
    packing.pack(samples, folder, "bad", samples_per_shard=16)
    broken = (f"data.root={folder}", "data.train=bad-*.tar", "data.max_bad_fraction=0.1", "data.eval=null")
    broken = (*broken, "data.in_memory=false", "data.workers=0", "duration=15 steps")
    live = run(stored, tmp_path / "live", *broken)
    assert live[-1]["bad_samples"] == 2
    manifest = compute(with_(stored, *broken))
    assert run(stored, tmp_path / "cached", "targets.source=cached", *broken) == live
    assert verify.verify(config.parse(with_(stored, *broken), "test"), 1000)

    reader = Reader(stored["targets"]["dir"], manifest, None, 0)
    assert not reader.rows(1, np.array([5, 40]), "logits").any()
    assert reader.read(1, np.array([39, 4]), ("logits", "pair1")).keys() == {"logits", "pair1"}
    message = r"view-001/logits/shard-00002.bin: record 8 is damaged, or its image could not be decoded"
    with pytest.raises(UserError, match=message):
        reader.read(1, np.array([39, 40]), ["logits"])


# --- mixed images -------------------------------------------------------------------------------------------

MIX = ("kd.mix={mixup: 0.8, cutmix: 1.0, prob: 0.9}",)


def test_mixed_images_have_stored_targets(stored, tmp_path, monkeypatch):
    live = run(stored, tmp_path / "live", *MIX)
    manifest = compute(with_(stored, *MIX))
    assert manifest.config["kd.mix.mixup"] == 0.8
    with monkeypatch.context() as patch:
        no_teacher(patch)
        assert run(stored, tmp_path / "cached", "targets.source=cached", *MIX) == live
    plain = run(stored, tmp_path / "plain", f"data.window={2**12}")
    assert [line["loss"] for line in plain[:13]] != [line["loss"] for line in live[:13]]  # in epochs 2 and 3
    assert verify.verify(config.parse(with_(stored, *MIX), "test"), 1000)

    resumed = with_(stored, f"run_dir={tmp_path}/resumed", *MIX)
    train_until(resumed, 17)  # in the middle of the third epoch, in KD
    train_until(with_(resumed, "targets.source=cached"))
    assert terms(tmp_path / "resumed") == live

    for override, key in {
        "kd.mix.mixup=0.7": "kd.mix.mixup: 0.8, this run has 0.7",
        "kd.mix=null": "kd.mix.mixup: 0.8, this run has None",
        "data.streams=4": "data.streams: 8, this run has 4",
        "data.window=50": "data.window: None, this run has 50",
    }.items():
        assert key in refusal(with_(stored, *MIX), override)


def test_mixed_images_of_ranks_and_micro_batches_have_the_same_targets(stored, tmp_path):
    tree = with_(stored, *MIX, "duration=15 steps")
    pair = with_(tree, f"targets.dir={tmp_path}/pair", "grad_accumulation=2")
    live = with_(pair, f"run_dir={tmp_path}/live")
    cached = with_(pair, f"run_dir={tmp_path}/cached", "targets.source=cached")
    run_ranks(compute_and_train, 2, pair, live, cached)
    assert terms(tmp_path / "cached") == terms(tmp_path / "live")
    assert_ranks_compute_the_same_targets(tree, pair, tmp_path)


@pytest.mark.parametrize("mix", [(), MIX])
def test_repeats_have_stored_targets(stored, tmp_path, mix):
    repeats = (*mix, "data.repeats=2", "data.augment.views=6", "data.in_memory=false", "data.workers=0")
    live = run(stored, tmp_path / "live", *repeats)
    manifest = compute(with_(stored, *repeats))
    assert manifest.fields["logits"].views == [0, 1, 4, 5]  # of the epochs 2 and 3: 4, 5 and 6, 7
    assert manifest.fields["pair1"].views == [0, 1]
    assert run(stored, tmp_path / "cached", "targets.source=cached", *repeats) == live
    assert verify.verify(config.parse(with_(stored, *repeats), "test"), 1000)


def test_a_pair_with_an_image_that_cannot_be_decoded_is_replaced(stored, tmp_path):
    folder = tmp_path / "bad"
    pack_images(folder, "whole", samples=64, per_shard=64, seed=1)
    bad = (5, 40, 41)
    samples = [
        (sample.key, b"no image" if i in bad else sample.image, "png", sample.label)
        for i, sample in enumerate(shards.ShardSet(str(folder / "whole-*.tar")).iterate())
    ]
    packing.pack(samples, folder, "bad", samples_per_shard=16)
    broken = (f"data.root={folder}", "data.train=bad-*.tar", "data.max_bad_fraction=0.2", "data.eval=null")
    broken = (*MIX, *broken, "data.in_memory=false", "data.workers=0", "duration=15 steps")
    live = run(stored, tmp_path / "live", *broken)
    assert live[-1]["bad_samples"] >= 2  # the partner of a bad sample is not looked at
    manifest = compute(with_(stored, *broken))
    assert run(stored, tmp_path / "cached", "targets.source=cached", *broken) == live
    assert run(stored, tmp_path / "memory", *broken, "data.in_memory=true") == live
    assert verify.verify(config.parse(with_(stored, *broken), "test"), 1000)
    reader = Reader(stored["targets"]["dir"], manifest, None, 0)
    without = ~reader.rows(0, np.arange(64), "logits").any(axis=1)
    assert without[list(bad)].all()
    assert without.sum() in (4, 6)  # with their partners
    assert (~reader.rows(0, np.arange(64), "pair1").any(axis=1)).sum() == 3


# --- what is refused ----------------------------------------------------------------------------------------


def save_teacher(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    network = Network(CNN32((16, 32, 64), 128), ((0, 0, 0), (1, 1, 1)))
    save_network(network, config.Model(name="cnn32_auxiliary"), path)


def test_a_mismatch_is_refused_by_name(stored, tmp_path):
    weights = tmp_path / "teacher.safetensors"
    save_teacher(weights, seed=1)
    stored["teacher"]["random"] = False
    stored = with_(stored, f"teacher.checkpoint={weights}", "kd.losses=[{name: ce}, {name: kd}]")
    assert "no stored targets there" in refusal(stored)
    compute(stored)
    root = stored["targets"]["dir"]
    again = "run `indistill targets CONFIG` again, in another targets.dir, or set targets: live"
    for override, told in {
        "data.augment.padding=2": "made with data.augment.padding: 4, this run has 2",
        "data.augment.views=3": "made with data.augment.views: 2, this run has 3",
        "data.augment.recipe=random_resized_crop": "made with data.augment.recipe: pad_crop",
        "data.augment.random_erasing={}": "made with data.augment.random_erasing.probability: None",
        "seed=1": "made with seed: 0, this run has 1",
        "teacher.mean=[0, 0, 0] teacher.std=[1, 1, 1]": "made with teacher.mean: None, this run has [0.0,",
        "mixed_precision=bf16": "made with teacher.precision: no, this run has bf16",
        "warmup.prune.criterion=l2": "made with warmup.prune.criterion: l1, this run has l2",
        "warmup.pairs=[[0, 0], [1, 1], [2, 2]]": "made with warmup.pairs: auto, this run has [[0, 0],",
        "targets.features=int8": "made with targets.features: float32, this run has int8",
        "targets.top_k=3": "made with targets.top_k: None, this run has 3",
        "targets.pool=2": "made with targets.pool: None, this run has 2",
        "data.train=eval-*.tar": "made from other shards",
        "warmup.durations=[8 steps, 1 steps, 1 steps]": "lacks pair1 in view 1, made for other durations",
        "kd.losses=[{name: pkt}]": "contains pair1, pair2, pair3, logits, but not embedding",
    }.items():  # fmt: skip
        message = refusal(stored, *re.split(r" (?=teacher)", override))
        assert message.startswith(root), message
        assert told in message, message
        assert message.endswith(again), message

    other = tmp_path / "other.safetensors"
    message = refusal(stored, f"teacher.checkpoint={other}")
    assert f"made with teacher.checkpoint: {weights} (SHA-256" in message
    assert f"this run has {other} (which is not here)" in message
    save_teacher(other, seed=2)
    assert f"this run has {other} (" in refusal(stored, f"teacher.checkpoint={other}")
    copy_of = tmp_path / "copy.safetensors"
    save_teacher(copy_of, seed=1)  # the same weights; the file's header may differ
    run(stored, tmp_path / "copy", f"teacher.checkpoint={copy_of}", "targets.source=cached")
    weights.unlink()
    run(stored, tmp_path / "gone", "targets.source=cached")
    run(stored, tmp_path / "without", "targets.source=cached", "warmup=null")  # needs fewer of them


def test_another_plan_is_refused(stored, tmp_path):
    run(stored, tmp_path / "run", "duration=13 steps")
    compute(stored)
    path = tmp_path / "run" / "prune_plan.json"
    plan = prune.Plan.read(path)
    kept = [0, 1, 2, 3, 4, 5, 6, 8]
    assert plan.pairs[0].kept != kept
    path.write_text(plan._replace(pairs=[plan.pairs[0]._replace(kept=kept), *plan.pairs[1:]]).to_json())
    assert f"made with another plan than {path}" in refusal(
        stored, "duration=13 steps", f"run_dir={tmp_path}/run"
    )
    message = refusal(stored, "student.name=cnn32_auxiliary")
    assert "(teacher stage, student stage, width) [(0, 0, 8), (1, 1, 16), (2, 2, 32)]" in message
    assert "this student has [(0, 0, 16)" in message


def test_interpolation_identifies_the_targets_where_it_decides_them(stored):
    def of(*overrides):
        return decisive_config(config.parse(with_(stored, *overrides), "test")).get("data.interpolation")

    for recipe, augmented in (
        ("random_resized_crop", []),
        ("none", []),
        ("pad_crop", ["data.augment.rand_augment={}"]),
    ):
        recipe = [f"data.augment.recipe={recipe}", *augmented]
        assert of(*recipe) == "bilinear"
        assert of(*recipe, "data.interpolation=random") == "random"
    assert of("data.interpolation=random") is None  # a crop of the padded image, which is not resized


def test_a_run_does_not_go_on_with_rounded_targets(stored, tmp_path):
    compute(with_(stored, "targets.features=int8"))
    run(stored, tmp_path / "run", "targets.features=int8", "duration=13 steps")
    message = refusal(stored, f"run_dir={tmp_path}/run", "targets.features=int8", "duration=13 steps")
    assert "targets.source: live -> cached" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.augment.views=null",
            "data.augment.views, the number of views of each sample, is missing: set it",
        ),
        (
            "data.access=stream data.in_memory=false data.epoch_samples=192",
            "data.access: stream has no sample ids",
        ),
        ("warmup.prune.mode=paper_bn", "warmup.prune.mode: paper_bn depends on the batch: set it to slice"),
        ("warmup.curriculum=auto", "warmup.curriculum: auto decides during the run"),
        (
            "teacher=null warmup=null kd.losses=[{name: ce}]",
            "there are no targets without a teacher and a student",
        ),
        ("targets.top_k=11", "targets.top_k is larger than data.num_classes (10): lower top_k"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_config(stored, override, message):
    with pytest.raises(UserError) as caught:
        config.parse(with_(stored, "targets.source=cached", *override.split(" ", 2)), "test")
    assert message in str(caught.value)


def test_a_bare_word_is_the_source(tree):
    tree["data"]["augment"]["views"] = 1
    settings = config.parse(tree | {"targets": "cached"}, "test")
    assert settings.targets == config.Targets(source="cached")
    assert config.parse(yaml.safe_load(config.dump(settings)), "test") == settings


# --- the job ------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def test_a_job_that_was_stopped_goes_on(stored, tmp_path, monkeypatch):
    compute(stored)
    whole = files(stored)
    assert len(whole) == 3 * (
        2 * len(FIELDS) - 1
    )  # shards, views and fields; pair1 is trained within one epoch
    part = with_(stored, f"targets.dir={tmp_path}/part")
    write_shard, written = write.write_shard, []

    def stopping(job, view, *, shard, batches, count):
        if len(written) == 4:
            next(batches)
            raise Stopped
        write_shard(job, view, shard=shard, batches=batches, count=count)
        written.append((view, shard))

    monkeypatch.setattr(write, "write_shard", stopping)
    with pytest.raises(Stopped):
        compute(part)
    root = Path(part["targets"]["dir"])
    assert not (root / "manifest.json").exists()
    assert "no stored targets there, only a part of them" in refusal(part)
    with pytest.raises(
        UserError, match=r"holds targets of another config \(seed: 0 -> 1\): choose another targets.dir"
    ):
        compute(with_(part, "seed=1"))
    kept = {path: path.stat().st_mtime_ns for path in root.rglob("*.bin")}
    for folder in (
        root / "view-001"
    ).iterdir():  # as killed jobs of this version and of the one before leave it
        (folder / "shard-00001.bin.4567.0a1b2c3d.part").write_bytes(b"half")
        (folder / "shard-00002.bin.123.0a1b2c3d.part").write_bytes(b"half")
    written.clear()
    compute(part)
    assert written == [(1, 1), (1, 2)]
    assert files(part) == whole
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(root.rglob("*.part"))

    written.clear()
    compute(part)  # nothing is left to do
    assert written == []
    (root / "view-000/logits/shard-00001.bin").write_bytes(b"cut")
    with pytest.raises(
        UserError, match=r"logits/shard-00001.bin: 3 bytes, not 2816: run `indistill targets CONFIG`"
    ):
        run(part, tmp_path / "cut", "targets.source=cached", "warmup=null")
    compute(part)
    assert written == [(0, 1)]
    assert files(part) == whole


def compute_and_train(tree: dict[str, Any], *runs: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "end_training", lambda self: None)  # it would close the process group
        compute(tree)
    for run in runs:
        train_until(run)


def assert_ranks_compute_the_same_targets(
    tree: dict[str, Any], of_rank: dict[str, Any], folder: Path
) -> None:
    """Compare the targets of one process with those of two, in float64: the last bits of a product depend on
    the size of the batch on some processors, and targets are rounded to float32 once.
    """
    whole = with_(tree, f"targets.dir={folder}/whole64")
    parts = with_(of_rank, f"targets.dir={folder}/parts64")
    run_ranks(in_float64, None, compute, whole)
    run_ranks(in_float64, 2, compute, parts)
    expected, found = values(whole), values(parts)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=EPS, atol=1e-12, err_msg=name)


def values(tree: dict[str, Any]) -> dict[str, np.ndarray]:
    """The stored numbers by file, each of whose records is intact."""
    fields = load_manifest(tree["targets"]["dir"]).fields
    found = {}
    for name, content in files(tree).items():
        record = fields[name.split("/")[1]].record
        rows = np.frombuffer(content, np.uint8).reshape(-1, record.itemsize)
        assert targets_records.intact(rows).all()
        found[name] = np.frombuffer(content, record)["values"]
    return found


def test_two_ranks_write_what_one_does(stored, tmp_path):
    pair = with_(stored, f"targets.dir={tmp_path}/pair")
    live = with_(stored, f"run_dir={tmp_path}/live", "duration=15 steps")
    cached = with_(pair, f"run_dir={tmp_path}/cached", "duration=15 steps", "targets.source=cached")
    run_ranks(compute_and_train, 2, pair, live, cached)
    assert terms(tmp_path / "cached") == terms(tmp_path / "live")
    assert_ranks_compute_the_same_targets(stored, pair, tmp_path)


def test_the_command(stored, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(stored))
    cli.main(["targets", str(path), "targets.top_k=4"])
    told, said = capsys.readouterr()
    assert "\r" not in said  # there is no terminal
    assert said.splitlines()[-1] == "indistill: targets of 384 of 384 images"
    assert said.endswith("\n")
    assert re.search(r"^logits +32 B a sample +2 views", told, re.MULTILINE)
    assert "192 samples: 0.010 GB" in told
    cli.main(["targets", str(path), "targets.top_k=4", "--verify", "30"])
    assert re.search(
        r"^2\d\d records recomputed: \d+ are the same bit for bit, .* 0 are wrong$",
        capsys.readouterr().out,
        re.M,
    )

    file = tmp_path / "targets" / "view-001" / "pair2" / "shard-00002.bin"
    content = bytearray(file.read_bytes())
    content[3 * 2308 + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["targets", str(path), "targets.top_k=4", "--verify", "1000"])
    assert exit_.value.code == 1
    lines = capsys.readouterr().out.strip().splitlines()[-2:]
    assert lines[0] == "view 1, train-000002.tar: sample train0131: pair2: damaged"
    assert lines[1].endswith(", 1 are wrong")

    for overrides, message in {
        ("data.augment.views=null",): "targets: data.augment.views, the number of views",
        ("targets.dir=s3://bucket/x",): "targets.dir s3://bucket/x: is not a local path",
        ("targets.top_k=3",): "holds targets of another config (field logits: ",
        (
            "kd.losses=[{name: ce}]",
            "warmup=null",
        ): "neither warmup nor kd.losses reads anything of the teacher",
        ("targets.dir=/proc/none",): "targets.dir /proc/none: cannot be written",
    }.items():
        with pytest.raises(SystemExit) as exit_:
            cli.main(["targets", str(path), *overrides])
        assert exit_.value.code == 2
        (line,) = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith("indistill: error")
        ]
        assert message in line


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_whole_lines_in_a_log_and_a_bar_in_a_terminal(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(write, "PLAIN_SECONDS", 0.0)
    with write.Count(3000, shown=True) as count, write.Count(3000, shown=False) as other:
        for _ in range(2):
            count.add(1500)
            other.add(1500)
    said = capsys.readouterr().err
    if terminal:
        assert "\r100%|" in said
        assert "3000/3000" in said
    else:
        assert said == "".join(f"indistill: targets of {n} of 3,000 images\n" for n in ("1,500", "3,000"))


def test_a_record_of_another_image_is_wrong(stored):
    """With a checksum that fits: as after a change in augmentation or decoding."""
    compute(stored)
    file = Path(stored["targets"]["dir"]) / "view-000" / "pair1" / "shard-00000.bin"
    records = np.frombuffer(file.read_bytes(), np.uint8).reshape(64, -1)
    file.write_bytes(records[::-1].tobytes())
    assert not verify.verify(config.parse(stored, "test"), 40)


def test_no_room_is_told_before_the_work(stored, monkeypatch):
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000}))
    with pytest.raises(UserError, match=r"needs 0.0 GB, but 0.0 GB are free: lower data.augment.views"):
        compute(stored)


def test_the_table_of_bytes():
    stages, sections = ((64, 56), (128, 28), (256, 14), (512, 7)), {
        "exact": {},
        "bf16": {"features": "bf16"},
        "int8": {"features": "int8"},
        "pool": {"features": "int8", "pool": 14, "top_k": 50},
    }  # fmt: skip
    text = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
    for values in sections.values():
        section, sizes = config.Targets(**values), []
        for pair, (channels, side) in enumerate(stages, start=1):
            target = live.pooled(torch.zeros(1, channels, side, side), section.pool)
            sizes.append(targets_records.describe(f"pair{pair}", target, section).record.itemsize)
        sizes.append(targets_records.describe("logits", torch.zeros(1, 1000), section).record.itemsize)
        assert f"| {' | '.join(f'{size:,}' for size in sizes)} |" in text


def test_heads_and_a_teacher_in_half_precision(stored, tmp_path):
    run(
        stored,
        tmp_path / "heads",
        "stage=heads",
        "student=null",
        "warmup=null",
        "kd.losses=[{name: ce}]",
        "duration=2",
    )
    cohort = (f"teacher.heads={tmp_path}/heads/heads.safetensors", "kd.losses=[{name: dih}, {name: at}]")
    cohort = (*cohort, "mixed_precision=bf16", "duration=20 steps")
    live = run(stored, tmp_path / "live", *cohort)
    manifest = compute(with_(stored, *cohort))
    assert [name for name in manifest.fields if name.startswith("head")] == ["head1", "head2", "head3"]
    assert manifest.fields["pair1"].dtype == manifest.fields["logits"].dtype == "bfloat16"
    assert run(stored, tmp_path / "cached", "targets.source=cached", *cohort) == live


def test_without_records_targets_are_zeros_of_their_shape(stored):
    """As ZeRO needs them, to learn which parameters a phase trains."""
    reader = Reader(stored["targets"]["dir"], compute(stored), None, 0)
    cached = CachedTargets(reader, config.parse(stored, "test").kd.losses, kd_stages=[0, 1, 2])
    found = cached(torch.zeros(2, 3, 32, 32), Phase("kd", 3, (), (), 13, None))
    assert [tuple(x.shape) for x in found.features] == [(2, 16, 15, 15), (2, 32, 6, 6), (2, 64, 2, 2)]
    assert (found.embedding.shape, found.logits.shape) == ((2, 128), (2, 10))
    (pruned,) = cached(torch.zeros(2, 3, 32, 32), Phase("warmup 2/3", 1, (1,), (1.0,), 4, 8)).features
    assert pruned.shape == (2, 16, 6, 6)
    assert not pruned.any()
