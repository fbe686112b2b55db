"""Made-up configs, overrides, durations and DeepSpeed files."""

from __future__ import annotations

import json

import pytest
import yaml
from fuzzing import BAD_JSON, TEXTS, VALUES, changed_trees, encoded, fuzz, mutated, mutated_json
from hypothesis import strategies as st

from indistill import config
from indistill.config import UserError, runs
from indistill.config.ranks import Ranks
from indistill.distributed.deepspeed_config import zero_config

TREE = {
    "run_dir": "runs/fuzz",
    "duration": "24 steps",
    "data": {
        "root": "data", "train": "train-{000..002}.tar", "eval": ["eval-*.tar"], "num_classes": 10,
        "image_size": 32,
        "global_batch": 32, "augment": {"recipe": "pad_crop", "color_jitter": {"brightness": 0.1}},
    },
    "student": {"name": "cnn32_student", "kwargs": {"drop_rate": 0.1}, "mean": [0.5, 0.5, 0.5], "std": [0.2,
    0.2, 0.2]},
    "teacher": {"name": "cnn32_auxiliary", "random": True},
    "warmup": {"curriculum": "sequential", "durations": ["4 steps", "4 steps", "5 steps"]},
    "kd": {"losses": [{"name": "ce"}, {"name": "kd", "weight": 0.5}]},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "multistep", "decay_at": ["10 steps"]},
    "checkpoint": {"every_steps": 3},
    "evaluate": {"every": "1 epoch"},
    "trackers": ["tensorboard"],
}  # fmt: skip
SEVERAL = {key: value for key, value in TREE.items() if key not in ("student", "kd")} | {
    "students": [
        {"name": "a", "student": {"name": "cnn32_student"}, "kd": {"losses": [{"name": "kd"}]}},
        {"name": "b", "student": {"name": "cnn32_student"}, "kd": {"losses": [{"name": "ce"}]}},
    ]
}
BAD_YAML = [
    *BAD_JSON,
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
    b"a: &a [*a]",
    b"? [a]\n: b",
    b"!!python/object/apply:os.system ['true']",
    b"duration: 2024-99-99",
    b"duration: 1e999999999 steps",
    b"- a: " * 2000,
    b"a: 1:00:00\n<<: {b: 1}\n<<: 3\n",
    b"a: !!binary x\nb: !!set {a}\nc: !!omap [a: 1]\nd: !!float x",
    b"\t",
    b"a: 0x" + b"f" * 5000,
    b"run_dir: 99999999999999999999-01-01",
]


@pytest.mark.parametrize("original", [TREE, SEVERAL], ids=["one", "several"])
def test_configs(tmp_path, original):
    file = tmp_path / "config.yaml"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        for _, settings in runs.load(file):
            assert config.parse(yaml.safe_load(config.dump(settings)), "dumped") == settings

    fuzz(
        read,
        changed_trees(original).map(encoded) | mutated(yaml.safe_dump(original).encode()),
        ordinary=[yaml.safe_dump(original).encode()],
        first=BAD_YAML,
    )


KEYS = st.sampled_from(
    ["run_dir", "duration", "data", "data.train", "data.train.0", "data.eval.0", "data.eval.9",
     "kd.losses.0.weight",
     "kd.losses.-1", "student.kwargs", "student.kwargs.x.y.z", "optimizer.lr", "warmup", "nothing", "a..b",
     ".", "",
     "evaluate.every", "seed", "trackers"]
)  # fmt: skip
WORDS = st.sampled_from(
    ["null", "{}", "[]", "{a: &a [*a]}", "[", "exp #2", "a: b", "2024-99-99", "1e5 steps",
     "1e999999999 steps", "-5",
     "0x1f", "1_000", ".inf", ".nan", "9" * 5000, "!!python/name:os.system", "*", "&a", "|", "[" * 3000, "'"]
)  # fmt: skip


def test_overrides(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(TREE))
    value = WORDS | TEXTS | VALUES.map(json.dumps)
    override = st.builds("{}={}".format, KEYS | TEXTS, value) | TEXTS

    def read(overrides: list[str]) -> None:
        runs.load(file, overrides)

    fuzz(
        read,
        st.lists(override, min_size=1, max_size=3),
        ordinary=[["seed=1"]],
        first=[["run_dir=a\nb"], ["duration=" + "9" * 10**6]],
    )


def test_durations():
    number = st.sampled_from(
        ["1", "0", "1e5", "1e999999999", "1e-999999999", ".5", "5.", "-1", "9" * 5000, "٣", "²", "nan"]
    )
    unit = st.sampled_from(
        ["epochs", "epoch", "steps", "STEPS", "samples", "percent", "%", "", "x", "\n", "steps "]
    )
    texts = st.builds("{}{}{}".format, number, st.sampled_from([" ", "", "\t", "\u00a0", "  "]), unit)

    def read(duration: object) -> None:
        for key in ("duration", "evaluate", "warmup"):
            changes = {
                "duration": duration,
                "evaluate": {"every": duration},
                "warmup": {"curriculum": "sequential", "durations": [duration] * 3},
            }
            settings = config.parse(TREE | {key: changes[key]}, "test")
            length = {"steps_per_epoch": 100, "global_batch": 32}
            try:
                steps = config.to_steps(settings.duration, **length)
            except ValueError as error:  # what pydantic makes the message of a key
                raise UserError(str(error)) from None
            assert steps >= 0

    fuzz(
        read,
        texts | TEXTS | VALUES | st.integers() | st.floats(),
        ordinary=["24 steps"],
        first=[True, 10**400, 1e308, -1],
    )


def test_deepspeed_files(tmp_path):
    file = tmp_path / "deepspeed.json"
    original = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000},
        "bf16": {"enabled": False},
    }  # fmt: skip
    settings = config.parse(TREE | {"engine": {"name": "deepspeed", "config_file": str(file)}}, "test")
    ranks = Ranks(missing=())  # as a launcher starts a process

    def read(content: bytes) -> None:
        file.write_bytes(content)
        zero_config(settings, ranks)

    fuzz(read, mutated_json(original), ordinary=[encoded(original)], first=BAD_YAML)
