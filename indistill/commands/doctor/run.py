"""`indistill doctor`: check whether a run will work on this node or, launched on several ranks, on all nodes.

A check is a function that yields (level, what, remedy); a check that raises counts as FAIL, with the text of
the error. Checks write only temporary files. Ranks exchange their findings through the store of the process
group, not by collectives, which may be broken; a thread ends a process that hangs and prints what is known by
then.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

import torch.distributed as dist

from indistill.commands.doctor import findings
from indistill.commands.doctor.disks import cache_dir, checkpoints, mirror, run_dir
from indistill.commands.doctor.findings import (
    FAIL,
    MOST_SHOWN,
    OK,
    WARN,
    Finding,
    Here,
    Line,
    Said,
    counted_word,
    listed,
)
from indistill.commands.doctor.inputs import class_lists, data_shards, evaluation_images, reading, weights
from indistill.commands.doctor.node import cores, gpu, open_files, shared_memory
from indistill.commands.doctor.ranks import agreement, all_reduce, clocks, one_file_system, start
from indistill.commands.doctor.software import deepspeed, environment, versions
from indistill.config import Config, UserError, in_one_line, printable

# --- the checks --------------------------------------------------------------------------------------------
Check = Callable[[Here], Said]
ALONE: tuple[Check, ...] = (versions, environment, start, deepspeed, gpu, cores, shared_memory, open_files)
ALONE += (run_dir, checkpoints, mirror, cache_dir, weights)
ALONE += (data_shards, class_lists, evaluation_images, reading)
TOGETHER: tuple[Check, ...] = (agreement, all_reduce, clocks, one_file_system)  # on all ranks, in this order


def run(stages: Sequence[tuple[str, Config]] = (), as_json: bool = False) -> int:
    """Check the configs of `runs.load` and print the findings; returns the exit code, 1 if any is FAIL.

    On several ranks, rank 0 prints the findings of all, and its exit code counts.
    """
    here = Here(stages)
    out = sys.stdout
    finished = threading.Event()
    threading.Thread(target=_watch, args=(here, as_json, out, finished), name="doctor", daemon=True).start()
    with contextlib.redirect_stdout(sys.stderr):  # libraries may print
        for check in ALONE:
            _look(check, here)
        if here.met and here.all_ready():
            for check in TOGETHER:
                # `agreement` fails on all ranks alike. After another failure, others may be in another
                # collective.
                if FAIL in _look(check, here) and check is not agreement:
                    break
        finished.set()
        return _report(here, as_json, out)


def _look(check: Check, here: Here) -> list[str]:
    """Run a check and keep its lines; returns their levels."""
    name = _name(check)
    levels = []
    here.at = name, time.monotonic()
    for item in _items(check, here):
        here.found.append(Line(name, *item))
        levels.append(item[0])
    here.at = "", 0.0
    return levels


def _items(check: Check, here: Here) -> Said:
    """The items of a check; an error is one more, FAIL."""
    try:
        yield from check(here)
    except Exception as error:  # a check may fail in any library
        yield FAIL, in_one_line(error, 500, with_type=not isinstance(error, UserError))


def _name(check: Check) -> str:
    return check.__name__.replace("_", " ")


def _watch(here: Here, as_json: bool, out: IO[str], finished: threading.Event) -> None:
    """End the process if a check takes too long, as when a disk or the network hangs."""
    while not finished.wait(0.1):
        name, since = here.at
        limit = findings.START_SECONDS if name == _name(start) else findings.CHECK_SECONDS
        if not name or time.monotonic() - since < limit:
            continue
        what = f"not finished within {limit:g} s"
        remedy = "check the file systems and the network"
        if name == _name(start):
            what += f": {_absence(here)}"
            remedy = "start all processes; open the ports between the nodes"
        here.found.append(Line(name, FAIL, what, remedy))
        os._exit(_report(here, as_json, out))


def _absence(here: Here) -> str:
    """Describe which ranks have not connected."""
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        here.connect(5.0)
    except (dist.DistError, KeyError, ValueError):
        return f"{address} cannot be reached"
    absent = [rank for rank in range(1, here.world) if here.receive("came", rank, 0.01) is None]
    if absent:
        return f"of {here.world} processes {here.named(absent)} did not connect to {address}"
    return f"all {here.world} processes connected to {address}, but not to each other"


def _report(here: Here, as_json: bool, out: IO[str]) -> int:
    """Print the findings of all ranks on rank 0, to which the others send theirs. Returns the exit code."""
    if here.rank and here.met:
        with contextlib.suppress(dist.DistError):
            here.connect(findings.CHECK_SECONDS)  # a new connection: the main thread's may be blocked
            here.send("found", [here.host, here.found])
        return 0
    if here.rank:
        for line in here.found:
            if line.level == FAIL:
                text_of_rank = f"indistill: {here.named([here.rank])}: {line.check}: {line.what}"
                print(printable(text_of_rank), file=sys.stderr, flush=True)
        time.sleep(5.0)  # lets rank 0 print: torchrun ends all processes when one has exited with an error
        return 1
    found = _gathered(here) if here.met else {0: list(here.found)}
    merged_findings = merged(found, here.hosts)
    bad = any(finding.level == FAIL for finding in merged_findings)
    lines = [finding._asdict() for finding in merged_findings]
    tree = {"ok": not bad, "processes": here.world, "lines": lines}
    shown = json.dumps(tree) if as_json else text(merged_findings, len(found))
    print(printable(shown, lines=True), file=out, flush=True)
    return int(bad)


def _gathered(here: Here) -> dict[int, list[Line]]:
    """Receive the lines of all ranks, by rank; a rank that does not answer is a line of rank 0."""
    found = {0: list(here.found)}
    end = time.monotonic() + findings.CHECK_SECONDS
    with contextlib.suppress(dist.DistError):
        here.connect(5.0)
    for rank in range(1, here.world):
        received = here.receive("found", rank, end - time.monotonic())
        if received is None:
            here.hosts[rank] = here.receive("came", rank, 0.01) or "host unknown"
            found[0].append(Line("ranks", FAIL, f"{here.named([rank])} does not answer", "see its output"))
        else:
            host, lines = received
            here.hosts[rank] = host
            found[rank] = [Line(*line) for line in lines]
    return found


def merged(found: dict[int, list[Line]], hosts: dict[int, str]) -> list[Finding]:
    """Merge equal lines of different ranks, in the order of the checks."""
    hosts_by_line: dict[Line, dict[int, str]] = {}  # host by rank, for each line
    for rank, lines in found.items():
        for line in lines:
            hosts_by_line.setdefault(line, {})[rank] = hosts[rank]
    merged_findings = [
        Finding(*line, list(of_rank), list(dict.fromkeys(of_rank.values())))
        for line, of_rank in hosts_by_line.items()
    ]
    # Sort, because a rank may have skipped checks; the line of a rank that does not answer is of no check.
    order = [_name(check) for check in (*ALONE, *TOGETHER)]
    position = {name: i for i, name in enumerate(order)}
    return sorted(merged_findings, key=lambda finding: position.get(finding.check, len(order)))


def text(merged_findings: Sequence[Finding], ranks_heard: int) -> str:
    """Format one line per finding; of those that are ok, only rank 0's if ranks differ."""
    lines = []
    counts = dict[tuple[str, str], int]()
    for check, level, what, remedy, ranks, hosts in merged_findings:
        if level == OK and 0 not in ranks:
            continue
        counts[check, level] = counts.get((check, level), 0) + 1
        if counts[check, level] > MOST_SHOWN:
            continue
        who = ""
        if level != OK and len(ranks) < ranks_heard:
            who = f"{counted_word('rank', ranks)} {listed(ranks)} ({', '.join(hosts[:MOST_SHOWN])}): "
        line = f"{level:4}  {check}: {who}{what}"
        lines.append(printable(f"{line}: {remedy}" if remedy else line))
    for (check, level), count in counts.items():
        if count > MOST_SHOWN:
            lines.append(f"{level:4}  {check}: {count - MOST_SHOWN} more of this kind (--json has them)")
    totals = [
        f"{sum(count for (_, of), count in counts.items() if of == level)} {level}"
        for level in (OK, WARN, FAIL)
    ]
    return "\n".join([*lines, ", ".join(totals)])
