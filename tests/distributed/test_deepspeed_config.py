"""DeepSpeed's configuration from its three sources, without DeepSpeed; conflicts are named."""

from __future__ import annotations

import json

import pytest
import yaml

from indistill import config
from indistill.config import UserError
from indistill.config.ranks import Ranks
from indistill.distributed import deepspeed_config


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The environment of a launcher, with DeepSpeed installed."""
    for name in (
        *deepspeed_config._LAUNCHER_VARIABLES,
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


@pytest.fixture
def zero(tree):
    """Return DeepSpeed's configuration for the tree with keys replaced; `engine_keys` in its section."""

    def zero(engine_keys=(), **keys):
        section = {"name": "deepspeed", **dict(engine_keys)}
        return deepspeed_config.zero_config(
            config.parse(tree | {"engine": section} | keys, "test"), Ranks.from_environment()
        )

    return zero


def launch(monkeypatch, **variables):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)


def test_what_tells_bad_steps_stays_on(zero, tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"compute_grad_norm": False}}))
    with pytest.raises(
        UserError, match=r"zero_optimization.compute_grad_norm: the norm decides which steps to skip"
    ):
        zero({"config_file": str(path)})


def test_ddp_unless_someone_asks(tree, monkeypatch):
    for section in (None, {"name": "ddp"}):
        assert (
            deepspeed_config.zero_config(
                config.parse(tree | {"engine": section}, "test"), Ranks.from_environment()
            )
            is None
        )
    launch(monkeypatch)
    assert (
        deepspeed_config.zero_config(config.parse(tree, "test"), Ranks.from_environment())[
            "zero_optimization"
        ]["stage"]
        == 2
    )
    with pytest.raises(
        UserError, match=r"engine.name is ddp, but accelerate launch was told to use DeepSpeed"
    ):
        deepspeed_config.zero_config(
            config.parse(tree | {"engine": {"name": "ddp"}}, "test"), Ranks.from_environment()
        )


def test_the_config_says_it_all(zero):
    keys = {"stage": 3, "offload_optimizer": "cpu", "reduce_bucket_size": 1000}
    found = zero(keys, grad_accumulation=4, clip_grad_norm=0.5, mixed_precision="bf16")
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert found["zero_optimization"]["reduce_bucket_size"] == 1000
    assert found["train_batch_size"] == 32
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 4
    assert found["gradient_clipping"] == 0.5
    assert not found["bf16"]["enabled"]  # autocast instead, with parameters in float32
    assert zero()["gradient_clipping"] == 0.0


def test_a_deepspeed_file(zero, tmp_path):
    file = tmp_path / "ds.json"
    content = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "communication_data_type": "bf16",
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "sub_group_size": 1e6},
    }
    file.write_text(json.dumps(content))
    found = zero({"config_file": str(file)}, clip_grad_norm=1.0, mixed_precision="bf16")
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["reduce_bucket_size"] == 5e8
    assert found["zero_optimization"]["sub_group_size"] == 1e6
    assert found["communication_data_type"] == "bf16"
    assert found["train_batch_size"] == 32


def test_a_file_of_accelerate_config(zero, tmp_path):
    file, of_deepspeed = tmp_path / "accelerate.yaml", tmp_path / "ds.json"
    section = {"zero_stage": 1, "gradient_accumulation_steps": 2, "offload_optimizer_device": "cpu"}
    file.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": section}))
    found = zero({"config_file": str(file)}, grad_accumulation=2)
    assert found["zero_optimization"]["stage"] == 1
    assert found["zero_optimization"]["offload_optimizer"]["device"] == "cpu"

    of_deepspeed.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    section = {"deepspeed_config_file": str(of_deepspeed), "zero3_init_flag": True}
    file.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", "deepspeed_config": section}))
    assert zero({"config_file": str(file)})["zero_optimization"]["stage"] == 3


def test_the_launcher(zero, monkeypatch, tmp_path):
    launch(
        monkeypatch, DEEPSPEED_ZERO_STAGE="3", GRADIENT_CLIPPING="1.0", DEEPSPEED_OFFLOAD_PARAM_DEVICE="cpu"
    )
    found = zero(clip_grad_norm=1)
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["offload_param"]["device"] == "cpu"
    with pytest.raises(
        UserError, match=r"accelerate launch: gradient_clipping is 1.0, but clip_grad_norm makes it 0"
    ):
        zero()


def test_the_launchers_variables_without_the_launcher(zero, monkeypatch):
    """Left over from another job: DeepSpeed's plugin of Accelerate reads them, too."""
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with pytest.raises(
        UserError, match=r"accelerate launch: zero_optimization.stage is 3, but engine.stage makes it 2"
    ):
        zero({"stage": 2})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2, but engine.stage makes it 3"),
        (
            {"gradient_accumulation_steps": 8},
            "gradient_accumulation_steps is 8, but grad_accumulation makes it 1",
        ),
        ({"train_batch_size": 64}, "train_batch_size is 64, but data.global_batch makes it 32"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, but mixed_precision is no"),
        (
            {"optimizer": {"type": "AdamW"}},
            "optimizer is set by optimizer of the config: remove it there",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set by schedule of the config"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast is set by mixed_precision of the config"),
        ({"distributed_type": "FSDP"}, "distributed_type is FSDP, not DEEPSPEED"),
        (["stage"], "expected a mapping"),
    ],
)
def test_conflicts_are_named(zero, tmp_path, content, message):
    file = tmp_path / "file.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"engine.config_file: .*{message}") as caught:
        zero({"stage": 3, "config_file": str(file)})
    assert "\n" not in str(caught.value)


def test_what_cannot_work_is_told_at_once(zero, tree, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"engine.config_file: nowhere.json: No such file"):
        zero({"config_file": "nowhere.json"})
    with pytest.raises(
        UserError, match=r"engine: offload_parameters: cpu needs stage 3, this is 2: set stage: 3"
    ):
        zero({"stage": 2, "offload_parameters": "cpu"})
    with pytest.raises(
        UserError,
        match=r"engine.offload_parameters: parameters can be offloaded in stage 3 only, but the stage is 2",
    ):
        zero({"offload_parameters": "cpu"})
    with pytest.raises(UserError, match=r"engine.stage: Input should be 1, 2 or 3"):
        zero({"stage": 4})
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(UserError, match=r"stage is 0: give 1, 2 or 3, or set engine.name: ddp"):
        zero({"config_file": str(tmp_path / "zero.json")})
    with pytest.raises(
        UserError,
        match=r"optimizer.name: lamb may use norms or factors of whole tensors, which ZeRO splits: choose",
    ):
        zero(optimizer={"name": "lamb", "lr": 0.1})
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match=r"engine: DeepSpeed needs a launcher, .* torchrun"):
        zero()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else name)
    with pytest.raises(
        UserError, match=r"DeepSpeed needs transformers: pip install 'indistill\[deepspeed\]'"
    ):
        zero()
