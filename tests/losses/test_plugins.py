"""Losses of a user's own: from a file and from an installed package, through the command line."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import unused_port
from safetensors.torch import load_file

from indistill import config
from indistill.commands.cli import main
from indistill.config import plugins
from indistill.config.files import read_lines, sha256
from indistill.distributed import agree, preemption
from indistill.training import checkpoint

ROOT = Path(__file__).parents[2]

# It compares samples, reads the teacher's embedding, has a key and the trained layers that lead from one
# width to another.
PAIRS = '''
import torch
from pydantic import PositiveFloat
from torch import nn
from indistill.losses import Loss

class Lift(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.linear = nn.Linear(shape.student_dim, shape.teacher_dim)

    def forward(self, output, targets):
        return self.linear(output.embedding), targets.embedding

class Pairs(Loss, name="pairs"):
    """Squared error of the samples' inner products."""
    reads = {"embedding"}
    compares = 2
    power: PositiveFloat = 2.0  # of the difference

    def layers(self, shape):
        return Lift(shape)

    def __call__(self, student, teacher, labels, epoch):
        ours, theirs = (x / x.norm(dim=1, keepdim=True) for x in student.projected)
        assert len(ours) != 16  # of two ranks: not those of one alone
        return ((ours @ ours.T - theirs @ theirs.T).abs() ** self.power).mean()
'''
# It compares samples without layers of its own, and reads labels.
CENTRED = """
from indistill.losses import Loss, kd

class Centred(Loss, name="centred"):
    reads = {"logits", "labels"}
    compares = 2
    whole_labels = True

    def __call__(self, student, teacher, labels, epoch):
        assert len(student.logits) == len(teacher.logits) == len(labels) != 16
        return kd(student.logits - student.logits.mean(dim=0), teacher.logits - teacher.logits.mean(dim=0))
"""


def write_package(folder: Path, name: str, loss: str, source: str, target: str | None = None) -> Path:
    """An installed package `name` in `folder`, whose entry point `loss` leads to its module."""
    (folder / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(source)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[indistill.losses]\n{loss} = {target or name}\n")
    return folder


def write_config(tree, tmp_path: Path, *losses: dict) -> Path:
    file = tmp_path / "config.yaml"
    del tree["warmup"]
    file.write_text(yaml.safe_dump(tree | {"kd": {"losses": [*losses]}, "duration": "6 steps"}))
    return file


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    paths = os.pathsep.join(map(str, [ROOT, *folders]))
    return (
        os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | variables
    )


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A folder for packages and plugin files, and what makes them found, or forgotten again."""
    for name in plugins.built_in():
        plugins.find(name)
    built_in, site = dict(plugins._classes), tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def forget() -> None:
        monkeypatch.setattr(plugins, "_classes", dict(built_in))
        monkeypatch.setattr(plugins, "_files", set())
        plugins._entry_points.cache_clear()
        importlib.invalidate_caches()
        for name, module in [*sys.modules.items()]:
            if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
                del sys.modules[name]

    forget()
    yield site, forget
    shutil.rmtree(site)
    forget()


@pytest.fixture
def command(installed, capsys):
    """Run the command line in this process; returns what it prints, or with an error its one line."""

    def run(*arguments: object, code: int = 0) -> str:
        installed[1]()
        capsys.readouterr()
        if not code:
            main([*map(str, arguments)])
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as exit_:
            main([*map(str, arguments)])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert exit_.value.code == code
        return line

    return run


def logged(run_dir: Path, name: str) -> list[float]:
    return [line[name] for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line]


# --- a loss of one's own, from the first step to the report -------------------------------------------------


@pytest.fixture
def both(tree, tmp_path, installed):
    """A config with a loss of an installed package and one of a file, and the option for the latter."""
    tree["checkpoint"] = {"every_steps": 2, "keep_last": 9}
    file = write_config(tree, tmp_path, {"name": "ce"}, {"name": "pairs", "power": 3.0}, {"name": "centred"})
    write_package(installed[0], "pairs_of_samples", "pairs", PAIRS)
    plugin = tmp_path / "centred.py"
    plugin.write_text(CENTRED)
    return file, ("--plugin", plugin), Path(tree["run_dir"])


def train_in_processes(world: int, site: Path, *arguments: object) -> None:
    """`indistill train` as a launcher starts it."""
    line = [sys.executable, "-m", "indistill", "train", *map(str, arguments)]
    port = str(unused_port())
    ranks = []
    for rank in range(world):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
        }
        variables = environment(site, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **place)
        ranks.append(subprocess.Popen(line, env=variables, stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, errors


def test_losses_of_a_package_and_of_a_file_train_and_resume(both, command, installed, tmp_path):
    file, plugin, run_dir = both
    train_in_processes(1, installed[0], file, *plugin)
    pairs = logged(run_dir, "pairs")
    assert len(pairs) == 6
    assert pairs[-1] < pairs[0]
    recorded = yaml.safe_load((run_dir / "config.yaml").read_text())["kd"]["losses"]
    assert recorded[1:] == [
        {"name": "pairs", "weight": 1.0, "power": 3.0},
        {"name": "centred", "weight": 1.0},
    ]
    state = load_file(run_dir / "checkpoints" / "step-00000002" / "model.safetensors")
    layers = {key for key in state if key.startswith("projectors")}
    assert layers == {"projectors.1.linear.weight", "projectors.1.linear.bias"}
    begin = next(iter(read_lines(run_dir / "history.jsonl")))
    assert {"loss pairs", "loss centred"} <= begin["software"].keys()

    command("train", file, *plugin, "--resume", run_dir / "checkpoints" / "step-00000002")
    assert logged(run_dir, "pairs") == pytest.approx(pairs, rel=1e-5)
    changed = command("train", file, *plugin, "kd.losses.1.power=1", code=2)
    assert "holds a run of another config (kd.losses" in changed

    # What looks at the run needs neither the package nor the file.
    shutil.rmtree(installed[0])
    installed[0].mkdir()
    assert Path(command("report", run_dir).strip()).exists()
    command("export", run_dir, tmp_path / "exported")
    assert "pairs (weight 1)" in (tmp_path / "exported" / "README.md").read_text()
    assert "unknown loss 'pairs'" in command("train", file, *plugin, code=2)


def test_a_file_that_was_edited_before_a_resume_is_named(tree, command, tmp_path):
    file = write_config(tree, tmp_path, {"name": "ce"}, {"name": "centred"})
    plugin = tmp_path / "centred.py"
    other = tmp_path / "other.py"  # no loss of the run is in it
    plugin.write_text(CENTRED)
    other.write_text(LOSS.format(name="other", body="pass"))
    run_dir = Path(tree["run_dir"])

    def resume() -> str:
        command("train", file, "--plugin", plugin, "--plugin", other, "log.every_steps=2")
        return (tmp_path / "warnings").read_text()

    def keep_warnings(line: str) -> None:
        with (tmp_path / "warnings").open("a") as warnings:
            warnings.write(line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_say", keep_warnings)
        (tmp_path / "warnings").touch()
        resume()
        other.write_text(other.read_text() + "# edited")
        assert resume() == ""
        before = next(iter(read_lines(run_dir / "history.jsonl")))["software"]["loss centred"]
        plugin.write_text(CENTRED + "# edited")
        assert re.fullmatch(
            rf"WARNING: loss centred: its code has changed since .*step-00000006 was saved \({before}, now "
            r"source file [0-9a-f]{12}\): the run goes on with the code of now",
            resume(),
        )
        # An earlier version of indistill kept no hashes.
        state = run_dir / "checkpoints" / "step-00000006" / "state.json"
        content = json.loads(state.read_text())
        del content["identity"]["loss centred"]
        state.write_text(json.dumps(content))
        manifest = state.with_name("manifest.json")
        entries = json.loads(manifest.read_text())
        entries["state.json"] = {"bytes": state.stat().st_size, "sha256": sha256(state)}
        manifest.write_text(json.dumps(entries))
        (tmp_path / "warnings").write_text("")
        assert resume() == ""

    assert Path(command("report", run_dir, "--plugin", plugin).strip()).exists()
    command("export", run_dir, tmp_path / "exported", "--plugin", plugin)
    assert "centred (weight 1)" in (tmp_path / "exported" / "README.md").read_text()


def test_the_plan_counts_what_the_losses_declare(both, command):
    file, plugin, _ = both
    plan = json.loads(command("plan", file, *plugin, "--world", 2, "--json"))
    (phase,) = plan["phases"]
    assert set(phase["record_bytes"]) == {"embedding", "logits"}
    # Of 32 samples, each rank sends the half that it has: embeddings of 128 and 128 numbers, logits of 10 and
    # 10, and a label. The gradients of the lifted embedding and of the student's logits are summed.
    gathered = 32 / 2 * (4 * (128 + 128) + 4 * (10 + 10) + 8)
    summed = 32 * (4 * 128 + 4 * 10)
    assert phase["network_bytes"]["samples of all ranks"] == gathered + summed


def test_what_the_losses_need_of_the_teacher_is_stored_and_read_back(both, command, tmp_path):
    file, plugin, _ = both
    stored = ["data.augment.views=2", f"targets.dir={tmp_path / 'targets'}"]
    command("targets", file, *plugin, *stored, "targets.source=cached")
    manifest = json.loads((tmp_path / "targets" / "manifest.json").read_text())
    assert set(manifest["fields"]) == {"embedding", "logits"}
    found = {}
    for source in ("live", "cached"):
        where = tmp_path / source
        command("train", file, *plugin, *stored, f"targets.source={source}", f"run_dir={where}")
        found[source] = logged(where, "pairs")
    assert found["cached"] == pytest.approx(found["live"], rel=1e-5)


def test_samples_of_two_ranks_are_compared(both, installed):
    file, plugin, run_dir = both
    train_in_processes(2, installed[0], file, *plugin)  # the losses assert that they see all samples
    assert len(logged(run_dir, "centred")) == 6


def test_ranks_with_another_source_of_a_loss_disagree(installed, tmp_path):
    hashes = []
    for line in ("", "# another"):
        installed[1]()
        (tmp_path / "centred.py").write_text(CENTRED + line)
        plugins.load_file(str(tmp_path / "centred.py"))
        hashes.append(agree.software_versions()["loss centred"])
    assert hashes[0] != hashes[1]


# --- the documentation's example ----------------------------------------------------------------------------


def test_the_example_of_the_documentation_trains(tree, tmp_path, command):
    page = (ROOT / "docs" / "losses.md").read_text()
    (source,) = re.findall(r"^cat > regression\.py <<'END'\n(.*?)^END$", page, re.MULTILINE | re.DOTALL)
    assert len(source.strip().splitlines()) <= 10
    plugin = tmp_path / "regression.py"
    plugin.write_text(source)
    file = write_config(tree, tmp_path, {"name": "ce"}, {"name": "regression"})
    command("train", file, "--plugin", plugin)
    assert len(logged(Path(tree["run_dir"]), "regression")) == 6
    wrong = command("train", file, "--plugin", plugin, "kd.losses.1.scale=hot", code=2)
    assert "kd.losses.1.scale: Input should be a valid number" in wrong


# --- mistakes -----------------------------------------------------------------------------------------------


def test_an_unknown_loss_is_refused_without_torch(tree, tmp_path):
    folder = write_package(tmp_path / "site", "mine", "distil", "raise RuntimeError('imported')")
    tree["kd"] = {"losses": [{"name": "dits"}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    code = (
        "import sys\nfrom indistill.config import UserError, load\n"
        "try:\n    load(sys.argv[1])\nexcept UserError as error:\n    print(error)\n"
        "assert not {'torch', 'timm', 'mine', 'indistill.losses'} & sys.modules.keys()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "kd.losses.0: unknown loss 'dits'; the nearest are dist, distil, dih" in done.stdout


def test_a_recorded_config_is_read_without_torch_and_without_the_loss(tree, tmp_path):
    recorded = tmp_path / "config.yaml"
    tree["kd"] = {
        "losses": [{"name": "kd", "temperature": 2.0}, {"name": "gone", "weight": 3.0, "sharp": [1, 2]}]
    }
    recorded.write_text(yaml.safe_dump(tree))
    code = (
        "import sys\nfrom indistill.config import flatten, load_recorded\n"
        "print(flatten(load_recorded(sys.argv[1]))['kd.losses'])\n"
        "from indistill.commands.report import page\nassert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(recorded)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(
        [{"name": "kd", "weight": 1.0, "temperature": 2.0}, {"name": "gone", "weight": 3.0, "sharp": [1, 2]}]
    )


BARE = "from indistill.losses import Loss\n\nclass Mine(Loss, name={name!r}):\n    {body}\n"
LOSS = BARE + "    def __call__(self, student, teacher, labels, epoch): ...\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            LOSS.format(name="kd", body="pass"),
            "line 3: ValueError: loss 'kd' is built in: choose another name",
        ),
        (LOSS.format(name="My Loss", body="pass"), "line 3: ValueError: loss name 'My Loss'"),
        (
            LOSS.format(name="mine", body="reads = {'maps'}"),
            "line 3: ValueError: Mine.reads: 'maps' is none of",
        ),
        (
            BARE.format(name="mine", body="sharp: float = 1.0"),
            "line 3: ValueError: Mine: has no formula: define __call__",
        ),
        ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = (\n", "line 1: SyntaxError: '(' was never closed"),
        (
            LOSS.format(name="mine", body="reads = 'logits'"),
            "line 3: ValueError: Mine.reads: 'logits' is no set",
        ),
        (LOSS.format(name="mine", body="teaches = ['logits']"), "Mine.teaches: ['logits'] is no set"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),  # not an end with exit code 0
        ("x = 1\n", "defines no loss"),
        (None, "no such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tree, tmp_path, command, source, message):
    file = write_config(tree, tmp_path, {"name": "ce"})
    plugin = tmp_path / "mine.py"
    if source is not None:
        plugin.write_text(source)
    line = command("train", file, "--plugin", plugin, code=2)
    assert f"--plugin {plugin}" in line
    assert message in line


@pytest.mark.parametrize(
    ("packages", "loss", "message"),
    [
        ({"one": "mine", "two": "mine"}, "mine", "two losses are named 'mine', in the packages one and two"),
        ({"one": "kd"}, "kd", "loss 'kd' of the package one is built in"),
        (
            {"broken": "mine"},
            "mine",
            "loss 'mine' of the package broken: ZeroDivisionError: division by zero",
        ),
        ({"leaving": "mine"}, "mine", "loss 'mine' of the package leaving: SystemExit: 0"),
        ({"empty": "mine"}, "mine", "its entry point empty defines no loss of that name"),
    ],
)
def test_a_package_that_cannot_be_used_is_one_line(
    tree, tmp_path, installed, command, packages, loss, message
):
    file = write_config(tree, tmp_path, {"name": loss})
    sources = {"broken": "1 / 0", "leaving": "import sys; sys.exit(0)", "empty": "x = 1"}
    for package, name in packages.items():
        source = sources.get(package, LOSS.format(name=name, body="pass"))
        write_package(installed[0], package, name, source)
    line = command("plan", file, code=2)
    assert "kd.losses.0: " in line
    assert message in line


@pytest.mark.parametrize(("local_rank", "lines"), [(0, 1), (1, 0)])
def test_a_file_that_one_node_lacks_is_named_by_that_node(
    tree, tmp_path, monkeypatch, capsys, local_rank, lines
):
    """Rank 0, on another node, has the file and cannot know of it."""
    file = write_config(tree, tmp_path, {"name": "ce"})
    for name, value in {"RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    left = []
    monkeypatch.setattr(preemption, "exit_at_once", left.append)
    with pytest.raises(SystemExit):
        main(["train", str(file), "--plugin", str(tmp_path / "absent.py")])
    assert left == [2]
    assert capsys.readouterr().err.count("absent.py: no such file") == lines


def test_two_files_or_a_file_and_a_package_of_one_name_are_refused(tree, tmp_path, installed, command):
    file = write_config(tree, tmp_path, {"name": "mine"})
    files = [tmp_path / "one.py", tmp_path / "two.py"]
    for plugin in files:
        plugin.write_text(LOSS.format(name="mine", body="pass"))
    line = command("train", file, "--plugin", files[0], "--plugin", files[1], code=2)
    assert f"two losses are named 'mine', in {files[0]} and {files[1]}: rename one" in line
    write_package(installed[0], "other", "mine", LOSS.format(name="mine", body="pass"))
    line = command("train", file, "--plugin", files[0], code=2)
    assert f"two losses are named 'mine', in {files[0]} and other: rename one" in line


def test_a_class_may_be_defined_again_and_is_given_what_it_declares(installed):
    for weight in (1.0, 2.0):
        exec(LOSS.format(name="again", body=f"weight: float = {weight}"), {"__name__": "notebook"})
    (loss,) = config.KD(losses=[{"name": "again"}]).losses
    assert loss.weight == 2.0
    with pytest.raises(AttributeError, match="not given 'logits': declare it in `reads`"):
        config.Inputs(embedding=1).logits  # noqa: B018
