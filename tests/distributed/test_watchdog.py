"""Who is named, in which words; and which errors are those of a lost process."""

from __future__ import annotations

import json
import os
import socket
import threading
from datetime import timedelta

import pytest
from torch import distributed

from indistill.config.ranks import Ranks
from indistill.distributed import preemption, watchdog
from indistill.distributed.watchdog import Place, Report, verdict


def report(host: str, passed: int, doing: str, still: float = 300.0) -> Report:
    return Report(host, Place(passed, 1204, "kd", doing, since=0.0), still)


def test_the_rank_that_is_behind_is_named():
    reports = {rank: report("a" if rank < 3 else "b", passed=91, doing="training") for rank in range(8)}
    reports[3] = report("b", passed=90, doing="waiting for data", still=301.4)
    assert verdict(reports, {}) == (
        "rank 3 (b) has been in step 1204, phase kd, waiting for data, for 301 s; ranks 0-2, 4-7 wait for it"
    )


def test_silent_ranks_are_named_first():
    reports = {
        0: report("a", 91, "training"),
        1: report("b", 90, "waiting for data"),
        2: report("c", 91, "training"),
    }
    assert verdict(reports, {2: 15.2}) == (
        "rank 2 (c) has not been heard from for 15 s (last: step 1204, phase kd, training); ranks 0-1 wait "
        "for it"
    )
    assert verdict(reports | {1: None}, {1: 20.0, 2: 15.0}) == (
        "ranks 1 (host unknown), 2 (c) have not been heard from for 20 s (last: step 1204, phase kd, "
        "training); rank 0 waits for them"
    )


def test_many_late_ranks_and_all_alike():
    reports = {rank: report("a", passed=7, doing="training", still=rank) for rank in range(20)}
    assert verdict(reports, {}) == (
        "all 20 ranks have been in step 1204, phase kd, training, for 19 s: they wait for each other, or one "
        "for its device"
    )
    reports[0] = report("a", passed=8, doing="training")
    assert "7 (a), 8 (a) and 11 more have been in" in verdict(reports, {})


def test_progress_at_the_same_place_does_not_pass_it():
    watchdog.begin_step(5, "kd")
    begun = watchdog._place
    watchdog.alive()
    assert watchdog._place[:4] == begun[:4]
    assert watchdog._place.since > begun.since
    watchdog.at("evaluating")
    assert str(watchdog._place) == "step 5, phase kd, evaluating"
    assert watchdog._place.passed == begun.passed + 1


def test_other_errors_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "leave", lambda reason: pytest.fail(reason))
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="shapes"), watchdog.explaining(tmp_path):
        raise RuntimeError("shapes cannot be multiplied")
    assert not list(tmp_path.iterdir())


# --- what strangers do to the store -------------------------------------------------------------------------
@pytest.fixture
def left(monkeypatch):
    """An event that is set when the process would leave."""
    event = threading.Event()
    monkeypatch.setattr(preemption, "leave", lambda reason: event.set())
    monkeypatch.setattr(watchdog, "_place", watchdog._place)
    return event


def watch(monkeypatch, port: int, timeout_minutes: float) -> watchdog._Watch:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return watchdog._Watch(Ranks(rank=0, world_size=2), timeout_minutes)


def test_a_store_that_does_not_answer_does_not_stop_the_clock(monkeypatch, left):
    monkeypatch.setattr(Ranks, "from_environment", lambda: Ranks(rank=0, world_size=2))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        watchdog.open(None, 0.01)
        assert left.wait(30)
        watchdog.close()


def test_garbage_in_the_store_is_a_silent_rank(monkeypatch, left):
    store = distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20)
    )
    for content in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(10_000), b""):
        with socket.create_connection(("127.0.0.1", store.port)) as scanner:
            scanner.sendall(content)
    of_watch = watch(monkeypatch, store.port, 1000)
    of_watch.store = of_watch._connect()
    garbage = [b"", b"null", b"[", b"[]", b"\xff", b"[" * 10**5, b'["h", [1, 2, "p", "d", NaN], 1]']
    garbage += [b'["h", [1, 2, "p", "d", 1e999], 1]', b'["h", [true, 2, "p", "d", 1], 1]', b"7" * 10**6]
    for text in garbage:
        store.set(f"{of_watch.prefix}1", text)
        now = watchdog._place.since + 0.6 * of_watch.timeout
        assert of_watch._exchange(watchdog._place, now)
        said = of_watch._verdict(now)
        assert said.startswith("rank 1 (host unknown) has not been heard from for 0 s"), text
    honest = Report("b", Place(7, 3, "kd", "training", 1.5), 2.5)
    store.set(f"{of_watch.prefix}1", json.dumps(honest))
    assert of_watch._exchange(watchdog._place, now)
    assert watchdog._parse(of_watch.heard[1][0]) == honest
    assert not left.is_set()
