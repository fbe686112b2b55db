"""`indistill init`: what it writes can be used as it is, and what is there stays."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_schemas
import pytest
import yaml

from indistill.commands import cli, init
from indistill.config import UserError, runs

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.yaml"))
SLURM = {"slurm": True, "nodes": 4, "partition": "gpu,big-2", "account": "lab_7"}


def written(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()
    }


def documents(text: str) -> list[dict[str, Any]]:
    """Return the objects of a Kubernetes file, after a check of their fields."""
    found = list(yaml.safe_load_all(text))
    kubernetes_schemas.check(found)
    return found


def test_without_a_name_all_recipes_are_listed(capsys):
    cli.main(["init"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == RECIPES
    assert all(len(line.split()) > 4 for line in lines)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_filled_in_for_every_cluster(name, tmp_path):
    init.write(name, str(tmp_path), **SLURM, kubernetes=True, data="s3://bucket/a=b/images")
    files = written(tmp_path)
    config = f"configs/{name}.yaml"
    assert set(files) == {config, init.SCHEMA, init.SBATCH, init.JOB, init.TRAIN_JOB, *init.STARTERS}
    expected = runs.load(REPOSITORY / config, ["data.root=s3://bucket/a=b/images"])
    found = runs.load(tmp_path / config)
    cache_dir = found[0][1].data.cache_dir
    assert cache_dir
    assert found == runs.load(
        REPOSITORY / config, ["data.root=s3://bucket/a=b/images", f"data.cache_dir={cache_dir}"]
    )
    assert len(found) == len(expected)
    (_, job), (_, train_job) = documents(files[init.JOB]), documents(files[init.TRAIN_JOB])
    (container,) = job["spec"]["template"]["spec"]["containers"]
    run_dir = yaml.safe_load(files[config])["run_dir"]
    for program in (container, train_job["spec"]["trainer"]):
        # With the recipe as it is in the image, too.
        found_there = runs.load(REPOSITORY / program["args"][0], program["args"][1:])
        assert [one.data for _, one in found_there] == [one.data for _, one in found]
        assert program["args"][1] == f"run_dir=/{run_dir}"


def test_a_recipe_alone_is_the_repositorys(tmp_path):
    commands = init.write("imagenet_r34_r18", str(tmp_path / "new" / "folder"))
    original = (REPOSITORY / "configs" / "imagenet_r34_r18.yaml").read_text()
    schema = (REPOSITORY / "configs" / "schema.json").read_text()  # the recipe names it for editors
    files = {"configs/imagenet_r34_r18.yaml": original, "configs/schema.json": schema}
    assert written(tmp_path / "new" / "folder") == files
    assert commands == [f"indistill {word} configs/imagenet_r34_r18.yaml" for word in ("doctor", "train")]


def test_the_batch_script_differs_from_the_template_in_its_options_alone(tmp_path):
    commands = init.write("imagenet_r34_r18", str(tmp_path), **SLURM)
    assert commands[-1] == f"sbatch {init.SBATCH} configs/imagenet_r34_r18.yaml runs/imagenet_r34_r18"
    lines = written(tmp_path)[init.SBATCH].splitlines()
    options = ["#SBATCH --nodes=4", "#SBATCH --partition=gpu,big-2", "#SBATCH --account=lab_7"]
    at = lines.index(options[0])
    assert lines[at : at + 3] == options
    lines[at : at + 3] = ["#SBATCH --nodes=1"]
    assert lines == (REPOSITORY / init.SBATCH).read_text().splitlines()
    assert os.access(tmp_path / "launch" / "torchrun.sh", os.X_OK)
    subprocess.run(["bash", "-n", tmp_path / init.SBATCH], check=True)


def test_the_job_has_the_nodes_and_a_volume_for_local_data_alone(tmp_path):
    def job(name: str, **options):
        init.write("imagenet_r34_r18", str(tmp_path / name), kubernetes=True, **options)
        return documents((tmp_path / name / init.JOB).read_text())[1]["spec"]

    template = documents((REPOSITORY / init.JOB).read_text())[1]["spec"]
    assert job("plain") == template | {"template": job("again")["template"]}
    spec = job("mine", nodes=3, data="/mnt/images")
    pod = spec["template"]["spec"]
    assert (spec["completions"], spec["parallelism"]) == (3, 3)
    environment = {entry["name"]: entry.get("value") for entry in pod["containers"][0]["env"]}
    assert environment["PET_NNODES"] == "3"
    assert {volume["name"] for volume in pod["volumes"]} == {"runs", "data", "shm"}
    assert {"name": "data", "mountPath": "/mnt/images"} in pod["containers"][0]["volumeMounts"]
    pod = job("remote", data="https://host/images")["template"]["spec"]
    assert {volume["name"] for volume in pod["volumes"]} == {"runs", "shm"}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {"runs", "shm"}


def test_the_train_job_has_the_nodes_and_a_volume_for_local_data_alone(tmp_path):
    def specs(name: str, **options):
        init.write("imagenet_r34_r18", str(tmp_path / name), kubernetes=True, **options)
        runtime, train_job = documents((tmp_path / name / init.TRAIN_JOB).read_text())
        (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
        return train_job["spec"]["trainer"], job["template"]["spec"]["template"]["spec"]

    trainer, pod = specs("mine", nodes=3, data="/mnt/images")
    assert trainer["numNodes"] == 3
    assert trainer["args"][-1] == "data.root=/mnt/images"
    assert {volume["name"] for volume in pod["volumes"]} == {"runs", "data", "shm"}
    assert {"name": "data", "mountPath": "/mnt/images"} in pod["containers"][0]["volumeMounts"]
    _, pod = specs("remote", data="https://host/images")
    assert {volume["name"] for volume in pod["volumes"]} == {"runs", "shm"}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {"runs", "shm"}


def test_the_commands_name_both_forms_of_the_job(tmp_path):
    commands = init.write("imagenet_r34_r18", str(tmp_path), kubernetes=True)
    assert commands[1] == f"kubectl apply -f {init.JOB}"
    assert commands[2].startswith(f"kubectl apply -f {init.TRAIN_JOB} ")
    assert len(commands) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 2}, "--nodes is for --slurm or --kubernetes"),
        ({"partition": "gpu"}, "--partition is for --slurm"),
        ({"account": "a", "kubernetes": True}, "--account is for --slurm"),
        ({"data": "pipe:true"}, "data.root"),
        (
            {"data": "data/images", "kubernetes": True},
            "--data data/images: a pod mounts a volume at an absolute path",
        ),
        ({"data": "gopher://host/x"}, "gopher"),
        ({"data": "https://host/x?signature=1"}, "--data: has a password or a signature"),
        ({"data": "https://me:word@host/x"}, "--data: has a password or a signature"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        init.write("imagenet_r34_r18", str(tmp_path / "new"), **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("option", ["partition", "account", "data"])
@pytest.mark.parametrize(
    "value",
    [
        "",
        "a b",
        "a\nb",
        "a\n",
        "$(touch x)",
        "`x`",
        "a;b",
        "a'b",
        'a"b',
        "a\\b",
        "a#b",
        "a{b}",
        "-a",
        "é",
        "a\0",
    ],
)
def test_characters_that_names_do_not_have_are_refused(option, value, tmp_path):
    with pytest.raises(UserError, match=f"--{option} "):
        init.write("imagenet_r34_r18", str(tmp_path / "new"), slurm=True, **{option: value})
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["file", "broken link", "folder"])
def test_what_is_there_is_never_changed(kind, tmp_path):
    path = tmp_path / init.SBATCH
    path.parent.mkdir(parents=True)
    match kind:
        case "file":
            path.write_text("mine")
        case "broken link":
            path.symlink_to(tmp_path / "nowhere")
        case "folder":
            path.mkdir()
    with pytest.raises(UserError, match=rf"{init.SBATCH}: exists and is not changed"):
        init.write("imagenet_r34_r18", str(tmp_path), slurm=True)
    assert written(tmp_path) == ({init.SBATCH: "mine"} if kind == "file" else {})
    assert not (tmp_path / "nowhere").exists()


def test_a_second_recipe_joins_the_first(tmp_path):
    for name in ("imagenet_r34_r18", "imagenet_r34_r18_dkd", "imagenet_r34_r18"):
        init.write(name, str(tmp_path), **SLURM)
        (tmp_path / init.SCHEMA).write_text("of another version")
    assert len(list((tmp_path / "configs").iterdir())) == 3


def test_a_name_that_is_no_recipe_names_the_nearest(capsys, tmp_path):
    for name in ("imagenet_r34_r81", "../imagenet_r34_r18"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["init", name, str(tmp_path)])
        assert stopped.value.code == 2
        assert "is not a recipe; the nearest one is imagenet_r34_r18 " in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"configs/imagenet_r34_r18.yaml: cannot be written: Not a directory"):
        init.write("imagenet_r34_r18", str(tmp_path / "file"))
