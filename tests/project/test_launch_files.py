"""The launch files: the decisions of the SLURM script after a run, and the validity of the other files."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_schemas
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousTimeoutError

from indistill.config import runs

LAUNCH = Path(__file__).resolve().parents[2] / "launch"


def stub(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stubs of SLURM's commands for the batch script: a job of two nodes whose step writes a status."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    run_dir = tmp_path / "run"

    def submit(
        status: str | None,
        *,
        state: str = "RUNNING",
        restarts: int = 0,
        step: bool = False,  # the run makes a step
        idle: bool = False,  # it begins, and makes none
        **variables: str,
    ) -> dict[str, Any]:
        leave = "" if status is None else f"mkdir -p {run_dir}; printf '{status}\n' > {run_dir}/status"
        leave += f"; rm -f {run_dir}/starts_without_step" if step else ""
        # The run counts its first start (preemption.py).
        leave += (
            f"; [ -e {run_dir}/starts_without_step ] || echo 1 > {run_dir}/starts_without_step"
            if idle
            else ""
        )
        code = 0 if status == "done" else 1
        stub(
            bin_dir, "srun", f'echo "$PET_MASTER_ADDR $PET_NNODES $@" > {tmp_path}/srun\n{leave}\nexit {code}'
        )
        stub(bin_dir, "squeue", f"echo {state}")
        stub(
            bin_dir,
            "scontrol",
            f"""case "$*" in
            "show hostnames gpu[3-4]") printf 'gpu3\\ngpu4\\n' ;;
            "show node gpu3") printf 'NodeName=gpu3 Arch=x86\n   NodeAddr=10.0.0.3 NodeHostName=host3\n' ;;
            "requeue 7") touch {tmp_path}/requeued ;;
            *) exit 9 ;;
            esac""",
        )
        (tmp_path / "requeued").unlink(missing_ok=True)
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[3-4]", "SLURM_JOB_NUM_NODES": "2"}
        job |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        result = subprocess.run(
            ["bash", LAUNCH / "slurm" / "train.sbatch", "a.yaml", str(run_dir), "seed=1"],
            env={"PATH": f"{bin_dir}:{os.environ['PATH']}", **job, **variables},
            capture_output=True,
            text=True,
        )
        requeued = (tmp_path / "requeued").exists()
        return {
            "code": result.returncode,
            "requeued": requeued,
            "srun": (tmp_path / "srun").read_text(),
            "out": result,
        }

    return submit


@pytest.mark.parametrize(
    ("status", "keywords", "requeued"),
    [
        ("requeue", {}, True),
        ("running", {}, True),  # killed
        ("failed\\nKeyError: x (traceback: errors/rank-3.txt)", {}, False),
        ("done", {}, False),
        ("failed\\ndata.root: no such folder", {}, False),  # a mistake in the config
        (None, {}, False),  # found before there was a run directory
        ("requeue", {"state": "COMPLETING"}, False),  # scancel
        ("requeue", {"restarts": 100}, False),
        ("requeue", {"restarts": 2, "MAX_RESTARTS": "3"}, True),
        ("requeue", {"restarts": 3, "MAX_RESTARTS": "3"}, False),
    ],
)
def test_what_the_batch_script_requeues(slurm, status, keywords, requeued):
    result = slurm(status, **keywords)
    assert result["requeued"] == requeued, result["out"]
    assert result["srun"] == (
        f"10.0.0.3 2 --kill-on-bad-exit=1 launch/torchrun.sh a.yaml run_dir={result['out'].args[3]} seed=1\n"
    )
    if not requeued:
        assert (result["code"] == 0) == (status == "done")


def test_a_new_job_forgets_what_an_earlier_one_left(slurm):
    assert slurm("running")["requeued"]
    assert not slurm(None)["requeued"]  # a mistake in the config, before anything is written
    assert slurm("running")["requeued"]
    assert slurm(None, restarts=1)["requeued"]  # the rendezvous failed: this job had begun before


def test_a_new_job_takes_no_notice_of_a_run_that_another_job_has_under_way(slurm, tmp_path):
    assert slurm("running")["requeued"]
    before = (tmp_path / "run" / "status").stat()
    assert not slurm(None)["requeued"]  # refused: the other one has the lock
    after = (tmp_path / "run" / "status").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_three_starts_in_a_row_without_a_step_are_the_last(slurm):
    assert slurm("requeue", step=True)["requeued"]
    assert slurm("running", restarts=1)["requeued"]  # the rendezvous failed
    assert slurm("running", restarts=2)["requeued"]
    result = slurm("running", restarts=3)
    assert not result["requeued"]
    assert "3 starts in a row without a step, the limit (MAX_IDLE_STARTS)" in result["out"].stdout
    assert result["code"] == 1


def test_a_step_starts_the_count_anew(slurm):
    assert slurm("running", idle=True)["requeued"]
    assert slurm("running", idle=True, restarts=1)["requeued"]
    assert slurm("running", step=True, restarts=2)["requeued"]
    assert slurm("running", idle=True, restarts=3)["requeued"]
    assert slurm("running", idle=True, restarts=4)["requeued"]
    assert not slurm("running", idle=True, restarts=5)["requeued"]
    assert slurm("running", idle=True)["requeued"]  # a new job


def test_the_first_start_counts_too(slurm):
    assert slurm("running", idle=True)["requeued"]
    assert slurm("running", idle=True, restarts=1)["requeued"]
    assert not slurm("running", idle=True, restarts=2)["requeued"]


@pytest.mark.parametrize("content", ["", "many", "9" * 40, "a[$(touch injected)]"])
def test_a_damaged_count_begins_anew(slurm, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "starts_without_step").write_text(content)
    assert slurm("running", restarts=1)["requeued"]
    assert (tmp_path / "run" / "starts_without_step").read_text() == "1\n"


def test_torchrun_is_told_by_its_environment(tmp_path):
    stub(tmp_path, "python", 'echo "$@"; env | grep ^PET_ | sort; trap')
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python")}

    def shown(**variables: str) -> list[str]:
        command = [LAUNCH / "torchrun.sh", "a.yaml", "seed=1"]
        result = subprocess.run(
            command, env=environment | variables, capture_output=True, text=True, check=True
        )
        return result.stdout.splitlines()

    lines = shown()
    assert lines[0] == f"{LAUNCH}/torchrun.py -m indistill train a.yaml seed=1"
    assert "PET_NNODES=1" in lines
    assert "PET_NPROC_PER_NODE=gpu" in lines
    assert not any("SIGTERM" in line for line in lines)  # passed on by torchrun
    lines = shown(SLURM_JOB_ID="7", SLURM_NODEID="3", PET_NNODES="4", PET_MASTER_ADDR="10.0.0.3")
    assert {
        "PET_NODE_RANK=3",
        "PET_NNODES=4",
        "PET_MASTER_ADDR=10.0.0.3",
        "PET_SIGNALS_TO_HANDLE=SIGINT",
    } <= {*lines}


def failed(*codes: int) -> ChildFailedError:
    return ChildFailedError("train", {i: ProcessFailure(i, 1, code, "none") for i, code in enumerate(codes)})


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (None, 0),
        (failed(75, 75), 75),
        (failed(75, 1), 1),  # the other one lost it
        (failed(2, 2), 2),
        (failed(-9), 75),
        (SignalException("", signal.SIGTERM), 75),
        (SignalException("", signal.SIGINT), 130),
        (RendezvousTimeoutError(), 75),
    ],
)
def test_the_exit_code_says_whether_to_start_again(monkeypatch, outcome, code):
    def torchrun() -> None:
        if outcome:
            raise outcome

    monkeypatch.setattr("torch.distributed.run.main", torchrun)
    assert runpy.run_path(str(LAUNCH / "torchrun.py"))["main"]() == code


@pytest.mark.parametrize("name", ["job", "spot"])
def test_a_job_ends_where_another_start_cannot_help(name):
    """Rules apply in order: a pod that was preempted counts as nothing, whatever its code."""
    *_, job = yaml.safe_load_all((LAUNCH / "kubernetes" / f"{name}.yaml").read_text())
    ignored, failing = job["spec"]["podFailurePolicy"]["rules"]
    assert ignored["action"] == "Ignore"
    assert failing == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}}


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_files(path):
    found = load_config_from_file(str(path))  # an unknown key is an error
    assert found.num_processes % found.num_machines == 0
    assert f"--config_file launch/accelerate/{path.name}" in path.read_text()


MANIFESTS = pytest.mark.parametrize(
    "path", sorted(LAUNCH.glob("kubernetes/*.yaml")), ids=lambda path: path.stem
)


def mappings(node: Any) -> Iterator[dict[str, Any]]:
    """Return every mapping in a document, at any depth."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from mappings(child)


@MANIFESTS
def test_every_manifest_has_the_fields_of_its_published_schema(path):
    kubernetes_schemas.check(list(yaml.safe_load_all(path.read_text())))


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        ("trainjob", "numNodes: 2", "nodes: 2", "'nodes' was unexpected"),
        ("trainjob", "numNodes: 2", 'numNodes: "2"', "'2' is not of type 'integer'"),
        ("trainjob", "runtimeRef: {", "runtimeReference: {", "'runtimeRef' is a required property"),
        ("trainjob", ', status: "True"', "", "'status' is a required property"),
        ("trainjob", "    - name: node #", "    - replicas: 1 #", "'name' is a required property"),
        ("job", "completions: 2", "completions: two", "'two' is not of type 'integer'"),
        ("job", 'value: "8"', "value: 8", "8 is not of type 'string'"),
        ("pytorchjob", 'nprocPerNode: "8"', "nprocPerNode: 8", "8 is not of type 'string'"),
    ],
)
def test_a_schema_refuses_what_the_cluster_would(path, old, new, message):
    text = (LAUNCH / "kubernetes" / f"{path}.yaml").read_text()
    assert text.count(old) == 1
    documents = list(yaml.safe_load_all(text.replace(old, new)))
    with pytest.raises(jsonschema.ValidationError, match=re.escape(message)):
        kubernetes_schemas.check(documents)


@MANIFESTS
def test_every_pod_runs_what_is_there(path):
    nodes = list(mappings(list(yaml.safe_load_all(path.read_text()))))
    programs = [node for node in nodes if "command" in node]  # containers, and the trainer of a TrainJob
    pods = [node for node in nodes if "containers" in node]
    assert programs
    for program in programs:
        assert os.access(LAUNCH.parent / program["command"][0], os.X_OK)
        assert (LAUNCH.parent / program["args"][0]).exists()
    assert pods
    for pod in pods:
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }


def test_the_config_of_the_spot_job_has_a_mirror():
    """Its overrides are keys of the config, and nothing in its pods outlives a node."""
    *_, job = yaml.safe_load_all((LAUNCH / "kubernetes" / "spot.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert all("emptyDir" in volume for volume in pod["volumes"])
    recipe, *overrides = pod["containers"][0]["args"]
    ((_, settings),) = runs.load(LAUNCH.parent / recipe, overrides)
    assert settings.mirror == "s3://bucket/runs/r34_r18"
    (scratch,) = [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] == "scratch"]
    assert settings.run_dir.startswith(f"{scratch}/")


def test_the_train_job_runs_the_pods_of_the_job():
    """The two differ in what Kubeflow Trainer fills in: the environment, and a Service of its own."""

    def document(name: str, kind: str) -> dict[str, Any]:
        documents = yaml.safe_load_all((LAUNCH / "kubernetes" / f"{name}.yaml").read_text())
        (found,) = [document["spec"] for document in documents if document["kind"] == kind]
        return found

    job, train_job = document("job", "Job"), document("trainjob", "TrainJob")
    runtime = document("trainjob", "TrainingRuntime")
    (replicated,) = runtime["template"]["spec"]["replicatedJobs"]
    node, trainer = replicated["template"]["spec"], train_job["trainer"]
    # What Trainer looks for.
    assert replicated["name"] == node["template"]["spec"]["containers"][0]["name"] == "node"
    labels = replicated["template"]["metadata"]["labels"]
    assert labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert train_job["runtimeRef"]["kind"] == "TrainingRuntime"
    for key in ("backoffLimit", "podFailurePolicy"):
        assert node[key] == job[key]
    pods = [spec["template"]["spec"] for spec in (job, node)]
    containers = [pod.pop("containers")[0] for pod in pods]
    assert pods[0].pop("subdomain")
    assert pods[0] == pods[1]
    variables = {entry["name"]: entry.get("value") for entry in containers[0]["env"]}
    assert trainer["numNodes"] == job["completions"] == int(variables["PET_NNODES"])
    assert trainer["numProcPerNode"] == int(variables["PET_NPROC_PER_NODE"])
    assert trainer["resourcesPerNode"]["limits"] == containers[0]["resources"]["limits"]
    for key in ("image", "command", "args"):
        assert trainer[key] == containers[0][key]
    for key in ("workingDir", "volumeMounts"):
        assert containers[1][key] == containers[0][key]
