"""A SLURM of several virtual nodes on this machine: its daemons on loopback, in a folder of their own.

As root, with Debian's packages:

    apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
    python tests/cluster/slurm/cluster.py NEW_FOLDER    # prints the variable for sbatch; ends with Ctrl-C

The partition `main` is preemptible, by jobs in `high`. All nodes report the same host name, which
`scontrol show node` tells apart by their NodeName.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")
START_SECONDS = 60.0
STOP_SECONDS = 20.0

CONFIG = """\
ClusterName=indistill
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
# A requeued job starts when its old credential has expired: 2 s after this.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
AuthType=auth/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# No cgroups, plugins for MPI, or accounting: they need more than these daemons.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MailProg=/bin/true
# The nodes have what they say, whatever this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
InactiveLimit=0
ReturnToService=2
{nodes}
PartitionName=main Nodes=n[1-{count}] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=n[1-{count}] State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 RealMemory=8000 State=UNKNOWN"
)


def missing() -> list[str]:
    """Return the programs that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def running(folder: Path, nodes: int = 2) -> Iterator[Path]:
    """Run a SLURM in `folder`, and yield its slurm.conf, which SLURM_CONF names to sbatch and the others.

    At the end its jobs are cancelled, and the daemons end. Raises RuntimeError if it does not start.
    """
    folder = folder.resolve()
    file = _write(folder, nodes)
    environment = os.environ | {"SLURM_CONF": str(file)}
    key, munge_socket = folder / "munge" / "key", folder / "munge" / "socket"
    munged = ["munged", "--foreground", f"--key-file={key}", f"--socket={munge_socket}", "--force"]
    munged += [f"--{kind}-file={folder}/munge/{kind}" for kind in ("pid", "log", "seed")]
    daemons: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: str) -> None:
        # In sessions of their own: a terminal's Ctrl-C would end them before their jobs.
        with (folder / f"{name}.out").open("wb") as output:
            daemon = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
                start_new_session=True,
            )  # fmt: skip
        daemons.append(daemon)

    try:
        start("munged", *munged)
        _wait_until(munge_socket.exists, "munged", folder)
        start("slurmctld", "slurmctld", "-D", "-i", "-f", str(file))
        for i in range(nodes):
            start(f"slurmd-n{i + 1}", "slurmd", "-D", "-N", f"n{i + 1}", "-f", str(file))
        _wait_until(lambda: _idle(environment) == nodes, f"{nodes} nodes", folder)
        yield file
    finally:
        _cancel_jobs(environment)
        for daemon in daemons[::-1]:
            _end(daemon)


def _write(folder: Path, nodes: int) -> Path:
    """Write slurm.conf and the key of munge."""
    (folder / "state").mkdir(parents=True)
    (folder / "munge").mkdir(mode=0o711)
    folder.chmod(0o755)
    key = folder / "munge" / "key"
    key.touch(mode=0o400)
    key.write_bytes(secrets.token_bytes(1024))
    host = socket.gethostname().partition(".")[0]
    port, *ports = _free_ports(nodes + 1)
    lines = []
    for i in range(nodes):
        (folder / f"spool-n{i + 1}").mkdir()
        lines.append(NODE.format(i=i + 1, host=host, port=ports[i]))
    file = folder / "slurm.conf"
    text = CONFIG.format(host=host, port=port, folder=folder, nodes="\n".join(lines), count=nodes)
    file.write_text(text)
    return file


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _output(environment: dict[str, str], *command: str) -> str:
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return result.stdout.strip()


def _idle(environment: dict[str, str]) -> int:
    """Return how many nodes wait for jobs."""
    return int(_output(environment, "sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D") or 0)


def _wait_until(happened: Callable[[], bool], what: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not happened():
        if time.monotonic() > deadline:
            logs = sorted([*folder.glob("*.out"), *folder.glob("*.log")])
            ends = [f"{path.name}: {path.read_text(errors='replace')[-500:]}" for path in logs]
            raise RuntimeError(f"{what}: not there within {START_SECONDS:.0f} s\n" + "\n".join(ends))
        time.sleep(0.1)


def _cancel_jobs(environment: dict[str, str]) -> None:
    """Cancel all jobs and wait for them, so that no process of theirs outlives the daemons."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        _output(environment, "scancel", "--user=root")
        deadline = time.monotonic() + STOP_SECONDS
        while _output(environment, "squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.1)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


if __name__ == "__main__":
    if absent := missing():
        sys.exit(f"not here: {', '.join(absent)}: see the first lines of this file")
    with running(Path(sys.argv[1])) as conf, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={conf}", flush=True)
        signal.pause()
