"""`indistill init`: list the recipes, or write one and the launch files of a cluster into a folder.

The files have the places that they have in the repository, so that its commands work in the folder.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

from indistill.config import UserError, printable, read, redacted, runs
from indistill.data.urls import check_url, is_remote

FOLDER = Path(__file__).parent  # with recipes/ and launch/, links in the repository
SBATCH = "launch/slurm/train.sbatch"
JOB = "launch/kubernetes/job.yaml"
TRAIN_JOB = "launch/kubernetes/trainjob.yaml"  # the same with Kubeflow Trainer
STARTERS = ("launch/torchrun.sh", "launch/torchrun.py")  # what all of them run
SCHEMA = "configs/schema.json"  # which a recipe names for editors
_CACHE_DIR = "/tmp/indistill"  # nosec B108  # of each node; a cache checks who owns it
_NODES = {  # the lines with the number of nodes
    JOB: (
        ("completions: ", "2 # edit: number of nodes", "{}"),
        ("parallelism: ", "2 # the same", "{}"),
        ("value: ", '"2" # edit: number of nodes', '"{}"'),
    ),
    TRAIN_JOB: (("numNodes: ", "2 # edit: number of nodes", "{}"),),
}
# These have no character that YAML, SLURM or a shell could read as anything but a part of the name.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]*")
_FOLDER = re.compile(r"[A-Za-z0-9_./~][A-Za-z0-9_./~:@%+=,-]*")


def recipes() -> dict[str, str]:
    """Return what each recipe trains, by its name: the first sentence of its comment."""
    return {path.stem: _title(path) for path in sorted((FOLDER / "recipes").glob("*.yaml"))}


def recipe_file(name: str) -> Path:
    """Return the file of a recipe. Raises UserError for an unknown name."""
    known = recipes()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise UserError(
            f"{name}: is not a recipe; the nearest one is {nearest} (`indistill init` lists all of them)"
        )
    return FOLDER / "recipes" / f"{name}.yaml"


def write(
    name: str,
    folder: str,
    *,
    slurm: bool = False,
    kubernetes: bool = False,
    nodes: int | None = None,
    partition: str | None = None,
    account: str | None = None,
    data: str | None = None,
) -> list[str]:
    """Write a recipe and the launch files into a folder; return the commands that come next.

    A file that is there already is never changed. Raises UserError, before anything is written, if one is
    there with another content, or for a value with characters that such names do not have.
    """
    _check_options(slurm, kubernetes, nodes=nodes, partition=partition, account=account, data=data)
    recipe = recipe_file(name)
    config = f"configs/{name}.yaml"
    tree = read(recipe)
    files = {config: _config(recipe, data)}
    commands = [f"indistill train {config}"]
    if slurm:
        files[SBATCH] = _sbatch(nodes, partition=partition, account=account)
        commands = [f"sbatch {SBATCH} {config} {tree['run_dir']}"]
    if kubernetes:
        files |= {job: _job(job, name, tree=tree, nodes=nodes, data=data) for job in (JOB, TRAIN_JOB)}
        commands = commands if slurm else []
        commands += [
            f"kubectl apply -f {JOB}",
            f"kubectl apply -f {TRAIN_JOB}  # instead, with Kubeflow Trainer",
        ]
    if slurm or kubernetes:
        files |= {starter: (FOLDER / starter).read_text() for starter in STARTERS}
    if not os.path.lexists(Path(folder, SCHEMA)):  # that of another version serves too
        files[SCHEMA] = (FOLDER / "recipes" / "schema.json").read_text()
    _write_new(Path(folder), files)
    return [f"indistill doctor {config}", *commands]


# --- checks of the options ----------------------------------------------------------------------------------
def _check_options(slurm: bool, kubernetes: bool, **values: Any) -> None:
    if values["nodes"] is not None and not (slurm or kubernetes):
        raise UserError("--nodes is for --slurm or --kubernetes: add one of them")
    data = values["data"]
    if kubernetes and data is not None and not (is_remote(data) or os.path.isabs(data)):
        raise UserError(f"--data {data}: a pod mounts a volume at an absolute path: give one, or a URL")
    for option in ("partition", "account"):
        value = values[option]
        if value is not None and not slurm:
            raise UserError(f"--{option} is for --slurm: add it")
        if value is not None and not _NAME.fullmatch(value):
            raise UserError(
                f"--{option} {value!r}: is not the name of a SLURM {option}: it has only letters, digits and "
                "_.,@+-"
            )


def _check_data(recipe: Path, data: str) -> None:
    if redacted(data) != data:
        raise UserError(
            "--data: has a password or a signature, which would be saved in the files: leave it out, and add "
            "data.root=URL to the command that trains"
        )
    if not _FOLDER.fullmatch(data):
        raise UserError(
            f"--data {data!r}: is not the path or URL of a folder: it has only letters, digits and "
            "_./~:@%+=,-; set data.root in the config to use another"
        )
    runs.load(recipe, [f"data.root={data}"])
    if is_remote(data):
        check_url(data)


# --- the content of the files -------------------------------------------------------------------------------
def _title(path: Path) -> str:
    lines = (line.removeprefix("# ") for line in path.read_text().splitlines())
    first = next(line for line in lines if not line.startswith("yaml-language-server"))
    return first.partition(". ")[0].removesuffix(".")


def _config(recipe: Path, data: str | None) -> str:
    text = recipe.read_text()
    if data is None:
        return text
    _check_data(recipe, data)
    lines = f"  root: {json.dumps(data)}"  # a JSON string is a YAML one
    if is_remote(data) and "\n  cache_dir:" not in text:
        lines += f"\n  cache_dir: {_CACHE_DIR} # edit: on a disk of each node, for fetched shards"
    (root,) = re.findall(r"^  root: .*$", text, re.MULTILINE)
    return _replaced(text, {root: lines})


def _sbatch(nodes: int | None, *, partition: str | None, account: str | None) -> str:
    lines = [f"#SBATCH --nodes={nodes or 1}"]
    lines += [f"#SBATCH --partition={partition}"] if partition else []
    lines += [f"#SBATCH --account={account}"] if account else []
    return _replaced((FOLDER / SBATCH).read_text(), {"#SBATCH --nodes=1": "\n".join(lines)})


def _job(job: str, name: str, *, tree: dict[str, Any], nodes: int | None, data: str | None) -> str:
    root = data or f"/{tree['data']['root']}"
    overrides = json.dumps(f"data.root={root}")
    if is_remote(root) and "cache_dir" not in tree["data"]:  # the image may have the recipe as it was
        overrides += f", data.cache_dir={_CACHE_DIR}"
    changes = {
        "[configs/imagenet_r34_r18.yaml, run_dir=/runs/r34_r18, data.root=/data/imagenet]": (
            f"[configs/{name}.yaml, run_dir=/{tree['run_dir']}, {overrides}]"
        )
    }
    if data is not None and not is_remote(data):
        changes["{name: data, mountPath: /data}"] = f"{{name: data, mountPath: {json.dumps(data)}}}"
    if nodes is not None:
        changes |= {key + old: key + new.format(nodes) for key, old, new in _NODES[job]}
    text = _replaced((FOLDER / job).read_text(), changes)
    return _without_data(text) if is_remote(root) else text


def _without_data(text: str) -> str:
    """Remove the volume of the shards from a job."""
    text, mounts = re.subn(r"^ *- \{name: data, mountPath: /data\}\n", "", text, flags=re.MULTILINE)
    text, volumes = re.subn(r"^ *- name: data\n *persistentVolumeClaim: .*\n", "", text, flags=re.MULTILINE)
    assert mounts == volumes == 1  # as in _replaced
    return text


def _replaced(text: str, changes: dict[str, str]) -> str:
    for old, new in changes.items():
        assert text.count(old) == 1, old  # tests/commands/test_init.py fills in every recipe and template
        text = text.replace(old, new)
    return text


# --- writing ------------------------------------------------------------------------------------------------
def _write_new(folder: Path, files: dict[str, str]) -> None:
    """Write files that are not there yet. Raises UserError if one is there with another content."""
    paths = {folder / name: text for name, text in files.items()}
    different = [path for path, text in paths.items() if os.path.lexists(path) and not _has(path, text)]
    if different:
        raise UserError(
            f"{', '.join(map(str, different))}: exists and is not changed: name another folder, or move it "
            "away"
        )
    for path, text in paths.items():
        if not os.path.lexists(path):
            _write(path, text)
        print(printable(str(path)))


def _has(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _write(path: Path, text: str) -> None:
    mode = 0o777 if path.suffix == ".sh" else 0o666  # less the umask
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
