"""Will a run work here? `indistill doctor` looks at what it needs of this node or, launched on several ranks, of all.

A check is a function that yields (level, what, remedy); one that crashes is a FAIL with the error's text. They leave
nothing behind: what they write are temporary files. Ranks tell each other what they found through the store where they
met, not by collectives, which may be what is broken; a thread ends a process that hangs, with what is known by then.
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

from indistill.commands.doctor import findings as doctor_findings
from indistill.commands.doctor.disks import cache_dir, checkpoints, run_dir
from indistill.commands.doctor.findings import FAIL, MOST_SHOWN, OK, WARN, Finding, Here, Line, Said
from indistill.commands.doctor.inputs import class_lists, data_shards, evaluation_images, reading, weights
from indistill.commands.doctor.node import cores, gpu, open_files, shared_memory
from indistill.commands.doctor.ranks import agreement, all_reduce, clocks, one_file_system, start
from indistill.commands.doctor.software import deepspeed, environment, versions
from indistill.config import Config, UserError, in_one_line

# --- all of them --------------------------------------------------------------------------------------------
Check = Callable[[Here], Said]
ALONE: tuple[Check, ...] = (versions, environment, start, deepspeed, gpu, cores, shared_memory, open_files)
ALONE += (run_dir, checkpoints, cache_dir, weights, data_shards, class_lists, evaluation_images, reading)
TOGETHER: tuple[Check, ...] = (agreement, all_reduce, clocks, one_file_system)  # on all ranks, in this order


def run(stages: Sequence[tuple[str, Config]] = (), as_json: bool = False) -> int:
    """Print what is found for the configs of `runs.load`, and return the exit code: 1 if anything is FAIL.

    On several ranks rank 0 prints what all have found, and its code is the one that counts.
    """
    here, out, over = Here(stages), sys.stdout, threading.Event()
    threading.Thread(target=_watch, args=(here, as_json, out, over), name="doctor", daemon=True).start()
    with contextlib.redirect_stdout(sys.stderr):  # where libraries may say what they like
        for check in ALONE:
            _look(check, here)
        if here.met and here.all_ready():
            for check in TOGETHER:
                # Ranks that disagree all know it. After another failure the others may be at another collective.
                if FAIL in _look(check, here) and check is not agreement:
                    break
        over.set()
        return _report(here, as_json, out)


def _look(check: Check, here: Here) -> list[str]:
    """Keep the lines of a check, FAIL for a crash; returns their levels."""
    name, levels = _name(check), []
    here.at = name, time.monotonic()
    for item in _said(check, here):
        here.found.append(Line(name, *item))
        levels.append(item[0])
    here.at = "", 0.0
    return levels


def _said(check: Check, here: Here) -> Said:
    try:
        yield from check(here)
    except Exception as error:  # of whatever it tried
        yield FAIL, in_one_line(error, 500, with_type=not isinstance(error, UserError))


def _name(check: Check) -> str:
    return check.__name__.replace("_", " ")


def _watch(here: Here, as_json: bool, out: IO[str], over: threading.Event) -> None:
    """End the process if a check takes too long: nothing else would, where a disk or the network hangs."""
    while not over.wait(0.1):
        name, since = here.at
        limit = doctor_findings.START_SECONDS if name == _name(start) else doctor_findings.CHECK_SECONDS
        if not name or time.monotonic() - since < limit:
            continue
        what, remedy = f"not over within {limit:g} s", "see what it waits for: a file system, the network"
        if name == _name(start):
            what, remedy = f"{what}: {_absence(here)}", "start all of them; open the ports between the nodes"
        here.found.append(Line(name, FAIL, what, remedy))
        os._exit(_report(here, as_json, out))


def _absence(here: Here) -> str:
    """Who has not come to where the ranks meet."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        here.connect(5.0)
    except (dist.DistError, KeyError, ValueError):
        return f"{place} cannot be reached"
    absent = [rank for rank in range(1, here.world) if here.hear("came", rank, 0.01) is None]
    if absent:
        return f"of {here.world} processes {here.named(absent)} did not come to {place}"
    return f"all {here.world} processes came to {place}, and did not get through to each other"


def _report(here: Here, as_json: bool, out: IO[str]) -> int:
    """Rank 0 hears the others and prints; they tell what they have found. Returns the exit code."""
    if here.rank and here.met:
        with contextlib.suppress(dist.DistError):
            here.connect(doctor_findings.CHECK_SECONDS)  # the main thread's connection may be waiting
            here.tell("found", [here.host, here.found])
        return 0
    if here.rank:
        for line in here.found:
            if line.level == FAIL:
                print(
                    f"indistill: {here.named([here.rank])}: {line.check}: {line.what}",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(5.0)  # for rank 0: torchrun ends all when one has ended so
        return 1
    found = {0: list(here.found)}
    if here.met:
        end = time.monotonic() + doctor_findings.CHECK_SECONDS
        with contextlib.suppress(dist.DistError):
            here.connect(5.0)
        for rank in range(1, here.world):
            told = here.hear("found", rank, end - time.monotonic())
            if told is None:
                here.hosts[rank] = here.hear("came", rank, 0.01) or "host unknown"
                found[0].append(
                    Line("ranks", FAIL, f"{here.named([rank])} does not answer", "see its output")
                )
            else:
                here.hosts[rank], found[rank] = told[0], [Line(*line) for line in told[1]]
    findings = merged(found, here.hosts)
    bad = any(finding.level == FAIL for finding in findings)
    tree = {"ok": not bad, "processes": here.world, "lines": [finding._asdict() for finding in findings]}
    print(json.dumps(tree) if as_json else text(findings, len(found)), file=out, flush=True)
    return int(bad)


def merged(found: dict[int, list[Line]], hosts: dict[int, str]) -> list[Finding]:
    """The lines of all ranks in the order of the checks, each once, with those that have it."""
    ranks: dict[Line, dict[int, str]] = {}  # and their hosts
    for rank, lines in found.items():
        for line in lines:
            ranks.setdefault(line, {})[rank] = hosts[rank]
    order = {
        name: i for i, name in enumerate(map(_name, (*ALONE, *TOGETHER)))
    }  # that of other ranks may be another
    findings = [Finding(*line, list(who), list(dict.fromkeys(who.values()))) for line, who in ranks.items()]
    return sorted(findings, key=lambda finding: order.get(finding.check, len(order)))


def text(findings: Sequence[Finding], heard: int) -> str:
    """A line each, of `heard` ranks; of what is ok and differs by rank only rank 0's."""
    lines, shown = [], dict[tuple[str, str], int]()
    for check, level, what, remedy, ranks, hosts in findings:
        if level == OK and 0 not in ranks:
            continue
        shown[check, level] = shown.get((check, level), 0) + 1
        if shown[check, level] > MOST_SHOWN:
            continue
        who = ""
        if level != OK and len(ranks) < heard:
            numbers = ", ".join(map(str, ranks[:MOST_SHOWN])) + ", ..." * (len(ranks) > MOST_SHOWN)
            who = f"rank{'s' * (len(ranks) > 1)} {numbers} ({', '.join(hosts[:MOST_SHOWN])}): "
        lines.append(f"{level:4}  {check}: {who}{what}" + f": {remedy}" * bool(remedy))
    for (check, level), count in shown.items():
        if count > MOST_SHOWN:
            lines.append(f"{level:4}  {check}: {count - MOST_SHOWN} more of this kind (--json has them)")
    counts = [
        f"{sum(n for (_, of), n in shown.items() if of == level)} {level}" for level in (OK, WARN, FAIL)
    ]
    return "\n".join([*lines, ", ".join(counts)])
