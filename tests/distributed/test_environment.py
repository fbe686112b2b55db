"""Variables that contradict the config: refused under every engine, by every command, before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from indistill import config
from indistill.commands.cli import main
from indistill.config import UserError, runs
from indistill.distributed import environment
from indistill.training import runs as training_runs
from indistill.training.start import start_accelerator


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [
        name for name in os.environ if name.startswith(("ACCELERATE_", "TORCH_COMPILE", "TORCHDYNAMO"))
    ]:
        if name != "ACCELERATE_USE_CPU":  # which is no word on any key
            monkeypatch.delenv(name)


@pytest.mark.parametrize("engine", [None, {"name": "ddp"}, {"name": "deepspeed", "stage": 2}])
@pytest.mark.parametrize(
    ("variable", "value", "keys", "says"),
    [
        ("ACCELERATE_MIXED_PRECISION", "bf16", {}, "mixed_precision is no"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", {"mixed_precision": "bf16"}, "mixed_precision is bf16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", {"mixed_precision": "bf16"}, "mixed_precision is bf16"),
        ("ACCELERATE_FP8_BACKEND", "MSAMP", {}, "mixed_precision is no"),
        ("ACCELERATE_USE_FSDP", "true", {}, "engine.name is "),
        ("ACCELERATE_USE_FSDP", "1", {}, "engine.name is "),
        ("ACCELERATE_USE_MEGATRON_LM", "True", {}, "engine.name is "),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", {}, "engine.name is "),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", {}, "compile is false"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune", {}, "compile is false"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", {}, "grad_accumulation is 1"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1", {"grad_accumulation": 2}, "grad_accumulation is 2"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "two", {"grad_accumulation": 2}, "grad_accumulation is 2"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", {}, "clip_grad_norm is None"),
        ("ACCELERATE_GRADIENT_CLIPPING", "1.0", {"clip_grad_norm": 0.5}, "clip_grad_norm is 0.5"),
    ],
)
def test_a_contradiction_is_one_line_that_names_both(tree, monkeypatch, engine, variable, value, keys, says):
    monkeypatch.setenv(variable, value)
    settings = config.parse(tree | {"engine": engine} | keys, "test")
    with pytest.raises(UserError) as caught:
        environment.check(settings)
    message = str(caught.value)
    assert message.startswith(f"{variable}={value} in the environment, but {says}")
    assert message.endswith(f": unset {variable}, or set both to the same value")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "EAGER"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune"),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "True"),
        ("ACCELERATE_DYNAMO_USE_DYNAMIC", "true"),
        ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "1"),
        ("TORCH_COMPILE_DISABLE", "1"),
        ("TORCHDYNAMO_DISABLE", "1"),
    ],
)
def test_what_compile_would_not_be(tree, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(
        UserError, match=rf"^{variable}={value} in the environment, but compile is true: unset"
    ):
        environment.check(config.parse(tree | {"compile": True}, "test"))


def test_what_the_launcher_says_where_nobody_chose_is_no_contradiction(tree, monkeypatch):
    """As `accelerate launch` of Accelerate 1.15 sets them without options, and with `auto` for DeepSpeed."""
    for name, value in {
        "ACCELERATE_USE_FSDP": "false",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DYNAMO_MODE": "default",
        "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
        "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
        "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
        "ACCELERATE_GRADIENT_CLIPPING": "auto",
    }.items():
        monkeypatch.setenv(name, value)
    chosen = {"mixed_precision": "bf16", "compile": True, "grad_accumulation": 4, "clip_grad_norm": 1.0}
    for keys in ({}, chosen):
        environment.check(config.parse(tree | keys, "test"))


def test_what_agrees_is_no_contradiction(tree, monkeypatch):
    for name, value in {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_GRADIENT_CLIPPING": "1",
    }.items():
        monkeypatch.setenv(name, value)
    keys = {"mixed_precision": "bf16", "compile": True, "grad_accumulation": 4, "clip_grad_norm": 1.0}
    environment.check(config.parse(tree | keys, "test"))


def test_accelerate_runs_what_the_config_says(tree, monkeypatch):
    """Accelerate alone would fail at `auto`: it makes a number of it."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    settings = config.parse(tree | {"mixed_precision": "bf16", "grad_accumulation": 2}, "test")
    accelerator = start_accelerator(settings)
    assert (accelerator.gradient_accumulation_steps, accelerator.mixed_precision) == (2, "bf16")
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"


def write(tree, tmp_path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("arguments", [["train"], ["eval", "any.pt"], ["plan"], ["targets"]])
def test_every_command_refuses(tree, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    tree["data"]["augment"]["views"] = 1
    command, *others = arguments
    with pytest.raises(SystemExit) as exit_:
        main([command, str(write(tree, tmp_path)), *others])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert (
        "ACCELERATE_USE_MEGATRON_LM=true in the environment, but engine.name is not set (ddp or deepspeed)"
        in line
    )
    assert not Path(tree["run_dir"], "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["stages", "students"])
def test_no_run_of_several_begins_before_all_agree(tree, tmp_path, monkeypatch, kind):
    """A later stage may have a precision of its own."""
    if kind == "stages":
        networks = {key: tree.pop(key) for key in ("student", "teacher", "warmup", "kd")}
        first = {"name": "first", "student": networks["student"]}
        tree["stages"] = [
            first,
            {"name": "second", "student": networks["student"], "mixed_precision": "bf16"},
        ]
    else:
        tree["students"] = [{"name": "first"}, {"name": "second"}]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16" if kind == "students" else "bf16")
    if kind == "stages":
        tree["stages"].reverse()
    with pytest.raises(UserError, match=r"^ACCELERATE_MIXED_PRECISION=.* but mixed_precision is no"):
        training_runs.run(runs.load(write(tree, tmp_path)))
    assert not [*Path(tree["run_dir"]).glob("*/config.yaml")]
