"""The command line: every mistake is one line and exit code 2, and help comes at once."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import refused
from PIL import Image

from indistill import config
from indistill.commands.cli import main
from indistill.config import UserError, runs
from indistill.data import shards
from indistill.distributed import preemption
from indistill.models.cnn32 import CNN32
from indistill.models.network import Network, save_network


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=gone-{0..1}.tar"], r"gone-0.tar: no such shard"),
        (["data.train=gone-*.tar"], r"gone-\*.tar: no such shard"),
        (["data.train=[]"], r"the list of shards is empty"),
        (["student.name=resnet_18"], r"student.name: timm has no model 'resnet_18'"),
        (
            ["teacher={name: cnn32_auxiliary, checkpoint: weights.pt}"],
            r"teacher.checkpoint: no file weights.pt",
        ),
        (
            ["teacher.name=cnn32_student", "student.name=cnn32_auxiliary"],
            r"16 channels, more than the 8.*conv1x1",
        ),
        (["data.global_batch=36"], r"must be divisible by data.streams.*32, 40"),
        (["data.global_batch=1000000"], r"larger than the data set"),
        (["grad_accumulation=3"], r"not divisible by .* grad_accumulation \(3\)"),
        (["data.num_clases=3"], r"data: unknown key 'num_clases'; the nearest valid key is 'num_classes'"),
        (["optimizer.lr=fast"], r"optimizer.lr: "),
        (["optimizer.name=sgdd"], r"optimizer: timm refuses sgdd"),
        (["duration=soon"], r"duration: .*'soon' is not understood"),
        (["duration=5 steps"], r"the warm-up takes 13 steps"),
        (["warmup.lr=[0.1, 0.2]"], r"warmup.lr: 2 values for 3 pairs"),
        (["data.num_classes=9"], r"label 9"),
        (["--resume", "nowhere"], r"no checkpoint there"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(config_file, tree, capsys, overrides, message):
    line = refused(capsys, "train", config_file, "trackers=[tensorboard]", *overrides)
    assert line.startswith("indistill: error: ")
    assert re.search(message, line), line
    assert not list(Path(tree["run_dir"]).glob("checkpoints/*"))
    assert not (Path(tree["run_dir"]) / "metrics.jsonl").exists()
    assert not (Path(tree["run_dir"]) / "tensorboard").exists()


def test_a_variable_of_accelerate_that_would_replace_a_key(config_file, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    for command in (["train", config_file], ["eval", config_file, "any.pt"]):
        line = refused(capsys, *command)
        assert (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=2 in the environment, but grad_accumulation is 1: unset"
            in line
        )


def test_a_head_of_another_size(config_file, tmp_path, capsys):
    weights = tmp_path / "head.safetensors"
    network = Network(CNN32((16, 32, 64), 128, num_classes=7), ((0, 0, 0), (1, 1, 1)))
    from indistill.config import Model

    save_network(network, Model(name="cnn32_auxiliary"), weights)
    line = refused(capsys, "train", config_file, f"teacher={{name: cnn32_auxiliary, checkpoint: {weights}}}")
    assert "fc2.weight is (7, 128)" in line
    assert "data.num_classes" in line


def test_a_run_directory_that_cannot_be_written(config_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "train", config_file, f"run_dir={tmp_path}/file/run", "trackers=[tensorboard]")
    assert "cannot be written" in line


def test_a_run_directory_that_holds_another_config(config_file, tree, capsys):
    main(["train", str(config_file), "duration=13 steps"])
    capsys.readouterr()
    before = (Path(tree["run_dir"]) / "metrics.jsonl").read_text()
    line = refused(capsys, "train", config_file, "duration=13 steps", "optimizer.lr=0.5")
    assert re.search(
        r"holds a run of another config \(optimizer.lr: 0.001 -> 0.5\): choose another run_dir", line
    )
    assert (Path(tree["run_dir"]) / "metrics.jsonl").read_text() == before


def test_a_cut_shard(config_file, tree, tmp_path, capsys):
    folder = tmp_path / "cut"
    folder.mkdir()
    source = sorted(Path(tree["data"]["root"]).glob("train-*.tar"))[0]
    (folder / "train-0.tar").write_bytes(source.read_bytes()[:20480])
    line = refused(
        capsys, "train", config_file, f"data.train={folder}/train-*.tar", f"data.cache_dir={tmp_path}/cache"
    )
    assert "train-0.tar" in line


def test_eval_scores_a_weights_file(config_file, tree, tmp_path, capsys):
    main(["train", str(config_file), "duration=13 steps"])
    trained = capsys.readouterr().out.strip().splitlines()[-1]
    main(["eval", str(config_file), f"{tree['run_dir']}/student.safetensors", "--json"])
    scores = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert scores.keys() == {"top1", "top5"}
    assert scores.items() <= json.loads(trained).items()  # which also tells how alike student and teacher are


def test_shards_are_packed_verified_and_indexed(tmp_path, capsys, tree):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (40, 30), (40 * i, 0, 0)).save(tmp_path / "images" / name / f"{i}.jpg")
    packed = tmp_path / "packed"
    main(["shards", "pack", str(tmp_path / "images"), str(packed), "--prefix", "pets", "--workers", "2"])
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["samples"], told["shards"]) == (12, 1)
    assert err == "labels: 0 = cat, 1 = dog\n"  # and no progress bar, because there is no terminal
    shutil.rmtree(tmp_path / "images" / "cat")
    split = ["shards", "pack", str(tmp_path / "images"), str(tmp_path / "split"), "--workers", "1"]
    main([*split, "--classes", str(packed)])
    capsys.readouterr()
    assert set(shards.ShardSet("split/*.tar", str(tmp_path)).labels) == {1}
    shard = packed / "pets-000000.tar"
    labels = [sample.label for sample in shards.ShardSet(str(shard)).iterate()]
    assert sorted(labels) == [0] * 6 + [1] * 6

    with pytest.raises(SystemExit) as exit_:
        main(["shards", "verify", str(shard), "--workers", "1"])
    assert exit_.value.code == 0
    verified = "12 images, 12 labelled (0 to 1, 2 different), 0 unlabelled\n0 bad members\n"
    assert capsys.readouterr() == (verified, "")
    with pytest.raises(SystemExit) as exit_:
        main(["shards", "verify", str(shard), "--workers", "1", "--num-classes", "1"])
    assert exit_.value.code == 1
    assert capsys.readouterr().out.endswith(
        "label 1 is none of the data.num_classes, 0 to 0\n"
        + verified.removesuffix("0 bad members\n")
        + "6 bad members\n"
    )

    content = bytearray(shard.read_bytes())
    start = content.index(b"JFIF") + 100
    content[start : start + 400] = bytes(400)  # inside the first image; the tar itself stays whole
    shard.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        main(["shards", "verify", str(shard), "--workers", "1"])
    assert exit_.value.code == 1
    with tarfile.open(shard) as tar:
        first = tar.getnames()[0].split(".")[0]
    assert f"pets-000000.tar: {first}: " in capsys.readouterr().out

    Path(f"{shard}.index.json").unlink()
    main(["shards", "index", str(shard), "--workers", "1"])
    assert capsys.readouterr() == ("12 samples in 1 shards\n", "")
    assert Path(f"{shard}.index.json").exists()
    assert "no such shard" in refused(capsys, "shards", "verify", tmp_path / "none.tar")


def test_help_imports_nothing_heavy():
    code = (
        "import sys, contextlib, io\n"
        "from indistill.commands.cli import main\n"
        "for arguments in (['--help'], ['train', '--help']):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        main(arguments)\n"
        "    assert 'train' in out.getvalue()\n"
        "print(sorted({'torch', 'accelerate', 'timm', 'numpy', 'pydantic'} & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "[]"


def test_commands_on_files_import_no_torch(data_dir, tree, tmp_path):
    """They start in moments. A report imports torch only to measure networks for the first time."""
    run = Path(tree["run_dir"])
    run.mkdir()
    supervised = tree | {"teacher": None, "warmup": None, "kd": {"losses": [{"name": "ce"}]}}
    (run / "config.yaml").write_text(config.dump(config.parse(supervised, "test")))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "phase": "supervised", "loss": 2.0}) + "\n")
    measured = {"seconds": {"student": 0.01}, "rounds": 3, "batch": 8, "precision": "no", "threads": 1}
    networks = {
        "student": {"name": "cnn32_student", "parameters": 80_000, "flops": 1_000_000},
        "speed": measured | {"device": "CPU", "torch": "2.6"},
    }
    (run / "networks.json").write_text(json.dumps(networks))
    shard = str(min(data_dir.glob("train-*.tar")))
    commands = [
        ["shards", "verify", shard, "--workers", "1"],
        ["shards", "index", shard, "--workers", "1", "--cache-dir", f"{tmp_path}/cache"],
        ["shards", "pack", shard, f"{tmp_path}/packed", "--workers", "1"],
        ["report", str(run)],
    ]
    code = (
        "import sys, contextlib, json\n"
        "from indistill.commands.cli import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    code = 0\n"
        "    try:\n"
        "        main(arguments)\n"
        "    except SystemExit as exit_:\n"
        "        code = exit_.code\n"
        "    heavy = sorted({'torch', 'torchvision', 'timm', 'accelerate'} & set(sys.modules))\n"
        "    assert (code, heavy) == (0, []), (arguments, code, heavy)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert (run / "report.html").exists()


@pytest.mark.parametrize("command", ["train", "plan", "eval", "doctor", "targets"])
@pytest.mark.parametrize(("local_rank", "lines"), [(0, 1), (1, 0)])
def test_what_one_node_lacks_is_named_by_that_node(
    config_file, tree, monkeypatch, capsys, command, local_rank, lines
):
    """Rank 0, on another node, has the config and the package of the loss, and cannot know of it."""
    for name, value in {"RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    left = []
    monkeypatch.setattr(preemption, "exit_at_once", left.append)
    more = ["any.safetensors"] if command == "eval" else []
    for config_here, message in (
        (config_file.with_name("gone.yaml"), "gone.yaml: No such file"),
        (config_file, "unknown loss 'of_a_package'"),
    ):
        with pytest.raises(SystemExit):
            main([command, str(config_here), *more, "kd.losses=[{name: of_a_package}]"])
        assert capsys.readouterr().err.count(message) == lines
    assert left == [2, 2]


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (8, 0)])
def test_what_all_ranks_know_is_printed_once(monkeypatch, capsys, rank, lines):
    def disagree(*_):
        raise UserError.of_all_ranks("the ranks disagree")

    environment = {"RANK": rank, "WORLD_SIZE": 16, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 8}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(preemption, "exit_at_once", lambda code: None)
    monkeypatch.setattr(runs, "load", disagree)
    with pytest.raises(SystemExit):
        main(["train", "any.yaml"])
    assert capsys.readouterr().err.count("the ranks disagree") == lines
