"""The report of runs, read in a real browser, and the record of a run's starts and ends."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browser import CHROMIUM, Browser
from conftest import CLASSES, data_section
from numpy.lib.stride_tricks import sliding_window_view

from indistill import config
from indistill.commands.cli import main
from indistill.commands.report import charts, networks
from indistill.commands.report import page as report_page
from indistill.commands.report.page import ReportAtEnd
from indistill.commands.report.read import read
from indistill.config import UserError, runs
from indistill.config.files import read_lines
from indistill.config.run_dir import append_end, append_start
from indistill.distributed import preemption
from indistill.models import network
from indistill.models.cnn32 import CNN32
from indistill.training import runs as training_runs

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def chain_tree(data_dir: Path, run_dir: Path) -> dict[str, Any]:
    """A teacher, and the student that it teaches: 24 steps, 13 of them warm-up, an evaluation every sixth."""
    return {
        "run_dir": str(run_dir),
        "data": data_section(data_dir),
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "log": {"every_steps": 1},
        "trackers": [],
        "checkpoint": {"every_steps": 5},
        "stages": [
            {"name": "teacher", "duration": "4 steps", "student": {"name": "cnn32_auxiliary"}},
            {
                "name": "student",
                "duration": "24 steps",
                "teacher": {"stage": "teacher"},
                "student": {"name": "cnn32_student"},
                "warmup": {"curriculum": "sequential", "durations": ["4 steps", "4 steps", "5 steps"]},
                "kd": {"losses": [{"name": "ce"}, {"name": "kd"}]},
                "evaluate": {"every": "6 steps", "retrieval": True},
            },
        ],
    }


@pytest.fixture(scope="module")
def chain(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a chain that was asked to stop at step 10 of its second stage, and went on."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "chain.yaml").write_text(yaml.safe_dump(chain_tree(data_dir, folder / "chain")))
    stages = runs.load(folder / "chain.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preemption.Agreement, "reached", lambda _, done, __: preemption.settle(done == 10))
        with pytest.raises(preemption.Preempted):
            training_runs.run(stages)
    training_runs.run(stages, callbacks=[ReportAtEnd()])
    return folder / "chain"


@pytest.fixture
def run(chain: Path, tmp_path: Path) -> Path:
    """A copy of the finished student's run, for a test to change."""
    return Path(shutil.copytree(chain / "student", tmp_path / "run"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH: apt-get install chromium")
    opened = Browser(tmp_path_factory.mktemp("chromium"))
    yield opened
    opened.close()


def data_of(file: Path) -> dict[str, Any]:
    """The numbers that a page embeds."""
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.S)[1]
    )


def curves(file: Path) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """By chart and series, the points of a page."""
    return {
        (chart["title"], series["name"]): list(zip(series["x"], series["y"]))
        for chart in data_of(file)["charts"]
        for series in chart["series"]
    }


def rows(file: Path) -> list[tuple[str, list[str]]]:
    """The rows of all tables: heading and the other cells, as they stand in the markup."""
    found = re.findall(r'<th scope="row">(.*?)</th>(.*?)</tr>', file.read_text())
    return [(heading, re.findall(r"<td>(.*?)</td>", rest)) for heading, rest in found]


# --- what a run records -------------------------------------------------------------------------------------


def test_starts_and_ends_are_recorded(chain):
    teacher, student = (read_lines(chain / name / "history.jsonl") for name in ("teacher", "student"))
    assert [line["event"] for line in teacher] == ["start", "end"]
    assert [(line["event"], line.get("step"), line.get("how")) for line in student] == [
        ("start", 0, None),
        ("end", None, "requeue"),
        ("start", 10, None),
        ("end", None, "done"),
    ]
    assert student[1]["reason"].startswith("stopped at step 10 of 24")
    first = student[0]
    assert (first["world_size"], first["host"], first["pid"]) == (1, os.uname().nodename, os.getpid())
    assert first["software"]["torch"] == network.torch.__version__
    assert [line["time"] for line in student] == sorted(line["time"] for line in student)


def test_a_mistake_and_a_crash_are_ends_with_a_reason(tmp_path):
    for error, reason in ((UserError("no room"), "no room"), (KeyError("x"), "KeyError: 'x' (")):
        run_dir = tmp_path / type(error).__name__ / "stage"
        run_dir.mkdir(parents=True)

        def begin_and_fail(run_dir: Path = run_dir, error: Exception = error) -> None:
            with preemption.status_in(run_dir.parent):
                append_start(run_dir, 3)
                raise error

        with pytest.raises(type(error)):
            begin_and_fail()
        last = read_lines(run_dir / "history.jsonl")[-1]
        assert last["how"] == "failed"
        assert last["reason"].startswith(reason)
    append_end(tmp_path, "done")  # nothing is open any more
    assert len(read_lines(run_dir / "history.jsonl")) == 2


def test_a_record_that_cannot_be_written_costs_nothing(tmp_path):
    (tmp_path / "history.jsonl").symlink_to("/dev/full")
    append_start(tmp_path, 0)
    append_end(tmp_path, "done")
    append_start(tmp_path / "none", 0)


def test_a_report_that_fails_fails_no_run(chain, tmp_path, monkeypatch, capfd):
    settings = config.load(chain / "teacher" / "config.yaml", [f"run_dir={tmp_path}/run", "duration=1 step"])
    monkeypatch.setattr(report_page, "html", lambda *_: 1 / 0)
    assert training_runs.run([("", settings)], callbacks=[ReportAtEnd()])[""]["step"] == 1
    printed = capfd.readouterr().err
    assert [line for line in printed.splitlines() if "report" in line] == [
        "indistill: no report written: ZeroDivisionError: division by zero"
    ]
    assert read_lines(tmp_path / "run" / "history.jsonl")[-1]["how"] == "done"


# --- in a browser -------------------------------------------------------------------------------------------


def test_the_page_in_a_browser(chain, run, browser, tmp_path):
    """Texts that could run as a script are shown, numbers are those of the run, and the page fits a phone."""
    state = run / "checkpoints" / "step-00000024" / "state.json"
    content = json.loads(state.read_text())
    content["parts"]["log"]["bad"] = [EVIL]
    state.write_text(json.dumps(content))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    saved["data"]["root"] = EVIL
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    with (run / "history.jsonl").open("a") as file:
        file.write(json.dumps({"event": "start", "time": 1.0, "step": 24, "host": EVIL}) + "\n")
    run = run.rename(run.with_name("<script>window.hacked = 1;"))
    page = report_page.write([run], baseline=chain / "teacher")
    assert page == run / "report.html"
    lines = read_lines(run / "metrics.jsonl")

    browser.complaints.clear(), browser.requests.clear()
    backgrounds = {}
    for width, dark, touch in ((1200, False, False), (360, True, True), (360, False, True)):
        browser.open(page, width, dark=dark, touch=touch)
        assert browser.value("document.documentElement.scrollWidth") <= width
        backgrounds[dark] = browser.value("getComputedStyle(document.body).backgroundColor")
    assert backgrounds == {False: "rgb(255, 255, 255)", True: "rgb(20, 23, 28)"}
    assert browser.value("window.hacked") is None
    assert browser.value("document.querySelectorAll('img').length") == 0
    text = browser.value("document.body.textContent")
    assert text.count(EVIL) >= 3  # a sample and a host, where it started and in the environment
    assert browser.value("document.querySelector('h1').textContent") == "<script>window.hacked = 1;"

    def shown_rows(table: str) -> dict[str, list[str]]:
        cells = "[...row.cells].map(cell => cell.textContent)"
        found = browser.value(
            f"[...document.querySelectorAll('[aria-label={table}] tbody tr')].map(row => {cells})"
        )
        return {first: rest for first, *rest in found}

    summary, of_teacher = (
        json.loads((folder / "summary.json").read_text()) for folder in (run, chain / "teacher")
    )
    results = shown_rows("Results")
    of_student = results["student"]
    assert of_student[5] == "cnn32_student"
    assert of_student[:2] == [f"{100 * summary['metrics'][key]:.2f}" for key in ("top1", "map_cosine")]
    assert (
        results["teacher"][0] == f"{100 * of_teacher['metrics']['top1']:.2f}"
    )  # of the run that it comes from
    seconds = json.loads((run / "networks.json").read_text())["speed"]["seconds"]
    assert results["teacher / student"][4] == f"{seconds['teacher'] / seconds['student']:.2f}×"
    assert [row[0] for row in shown_rows("Phases").values()] == ["4", "4", "5", "11"]

    # What a pointer, a finger and the arrow keys show.
    def shown(title: str, act: str, share: float = 0.5) -> dict[str, str]:
        plot = (
            "[...document.querySelectorAll('.plot')]"
            f".find(plot => plot.getAttribute('aria-label').startsWith('{title},'))"
        )
        browser.value(f"{plot}.scrollIntoView({{block: 'center'}})")
        box = json.loads(browser.value(f"JSON.stringify({plot}.getBoundingClientRect())"))
        where = box["x"] + share * box["width"], box["y"] + box["height"] / 2
        if act == "key":
            browser.value(f"{plot}.focus()")
            for kind in ("keyDown", "keyUp"):
                browser.call("Input.dispatchKeyEvent", type=kind, key="End")
        else:
            {"point": browser.point, "tap": browser.tap}[act](*where)
        tip = f"{plot}.querySelector('.tip')"
        assert browser.value(f"{tip}.hidden") is False
        texts = "[row.children[0].textContent, row.children[1].textContent]"
        return dict(browser.value(f"[...{tip}.children].map(row => {texts})"))

    def at(step: int, key: str) -> float:
        return next(line[key] for line in lines if line["step"] == step and key in line)

    values = shown("Loss", "tap")  # of steps 1 to 24 on an axis from 0
    assert values.pop("step, warmup 3/3") == "12"
    assert float(values["loss"]) == pytest.approx(at(12, "loss"), rel=1e-5)
    values = shown("Loss", "key")
    assert values.pop("step, kd") == "24"
    assert {name: float(value) for name, value in values.items()} == {
        name: pytest.approx(at(24, name), rel=1e-5) for name in ("loss", "ce", "kd")
    }
    browser.open(page, 1200)
    values = shown("Accuracy", "point", 0.99)
    assert values == {
        "step, kd": "24",
        **{key: f"{float(f'{100 * at(24, key):.6g}'):.15g} %" for key in ("top1", "top5")},
    }
    values = shown("Alignment of the maps (linear CKA)", "point", 0.01)
    assert float(values["pair1"]) == pytest.approx(at(6, "cka_pair1"), rel=1e-5)
    channel = shown("Pair 1: 8 of 16", "key")
    plan = json.loads((run / "prune_plan.json").read_text())
    kept = 15 in plan["pairs"][0]["kept"]
    assert channel == {"channel": "15", ("kept" if kept else "left out"): f"{plan['importance'][0][15]:.15g}"}

    assert browser.complaints == []
    assert [url for url in browser.requests if url != page.as_uri() and not url.startswith("data:")] == []


def test_a_comparison_in_a_browser(chain, run, browser, tmp_path):
    """With a run that was killed in its warm-up, between two evaluations."""
    (run / "summary.json").unlink()
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["step"] <= 7]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report_page.write(
        [chain / "student", run, chain / "teacher"], tmp_path / "deep" / "compared.html", measure=False
    )
    browser.complaints.clear(), browser.requests.clear()
    browser.open(page, 360, touch=True)
    assert browser.value("document.documentElement.scrollWidth") == 360
    browser.value("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert browser.value("document.documentElement.scrollWidth") == 360
    assert browser.complaints == []
    assert set(browser.requests) <= {page.as_uri(), "data:,"}


# --- what is in it ------------------------------------------------------------------------------------------


def test_every_number_of_the_run_is_in_its_curves(chain):
    """Written at the end of the run, in an order of its own: compared with the record by chart."""
    page, lines = chain / "student" / "report.html", read_lines(chain / "student" / "metrics.jsonl")
    found = curves(page)
    for title, key in (
        ("Loss", "loss"), ("Accuracy", "top1"), ("Accuracy", "top5"), ("Learning rate", "lr"),
    ):  # fmt: skip
        assert found[title, key] == [(line["step"], line[key]) for line in lines if key in line]
    for title, name, key in (
        ("Throughput", "images/s", "images_per_second"),
        ("Waiting for data", "waiting for data", "data_wait_fraction"),
        ("Divergence of the information flow", "divergence", "information_flow_divergence"),
        *(
            ("Alignment of the maps (linear CKA)", layer, f"cka_{layer}")
            for layer in ("pair1", "pair3", "embedding")
        ),
    ):
        assert found[title, name] == [(line["step"], line[key]) for line in lines if key in line]
    assert len(found["Accuracy", "top1"]) == 4
    bands = next(chart["bands"] for chart in data_of(page)["charts"] if chart["title"] == "Loss")
    assert bands == [["warmup 1/3", 0, 4], ["warmup 2/3", 4, 8], ["warmup 3/3", 8, 13], ["kd", 13, 24]]
    plan = json.loads((chain / "student" / "prune_plan.json").read_text())
    for pair, importance in zip(plan["pairs"], plan["importance"]):
        title = f"Pair {pair['student_stage'] + 1}: {len(pair['kept'])} of {pair['teacher_width']}"
        assert [channel for channel, _ in found[title, "kept"]] == pair["kept"]
        assert sorted(found[title, "kept"] + found[title, "left out"]) == list(enumerate(importance))
        assert min(y for _, y in found[title, "kept"]) >= max(y for _, y in found[title, "left out"])
    ends = [rest for _, rest in rows(page) if rest[-1].startswith(("requeue", "done"))]
    assert [row[0] for row in ends] == ["0", "10"]
    assert "Started 2 times." in page.read_text()
    assert "Speed is not measured yet" in page.read_text()


def test_networks_are_counted(chain):
    """Against counts by hand: three 3x3 convolutions without padding, batch norms, two linear layers."""
    widths, sides = (3, 8, 16, 32), (30, 13, 4)
    parameters = sum(9 * a * b + b + 2 * b for a, b in pairwise(widths)) + (4 * 32 + 1) * 64 + 65 * CLASSES
    products = (
        sum(9 * a * b * side**2 for a, b, side in zip(widths, widths[1:], sides)) + 4 * 32 * 64 + 64 * CLASSES
    )
    known = json.loads((chain / "student" / "networks.json").read_text())
    assert (known["student"]["parameters"], known["student"]["flops"]) == (parameters, 2 * products)
    whole = sum(p.numel() for p in CNN32((16, 32, 64), 128).parameters())
    assert known["teacher"]["parameters"] == whole


def test_speed_is_measured_once(run, monkeypatch):
    report_page.write([run])
    known = json.loads((run / "networks.json").read_text())
    assert known["speed"]["rounds"] >= 3
    assert known["speed"]["seconds"].keys() == {"teacher", "student"}
    assert all(0 < seconds < 10 for seconds in known["speed"]["seconds"].values())
    monkeypatch.setattr(networks, "speed", lambda *_: 1 / 0)
    report_page.write([run])
    assert json.loads((run / "networks.json").read_text()) == known
    (run / "networks.json").unlink()
    page = report_page.write([run])  # the page says what could not be measured
    assert "Speed could not be measured: ZeroDivisionError: division by zero." in page.read_text()


def test_several_runs_and_those_of_a_chain(chain, run, tmp_path):
    whole = report_page.write([chain], measure=False)
    assert whole == chain / "report.html"
    assert re.findall(r'<details class="run"><summary>(.*?)<', whole.read_text()) == ["teacher", "student"]

    other = yaml.safe_load((run / "config.yaml").read_text())
    other["optimizer"]["lr"] = 0.25
    (run / "config.yaml").write_text(yaml.safe_dump(other))
    page = report_page.write([run, chain / "student"], measure=False)
    assert page == run.parent / "comparison.html"
    table = dict(rows(page))
    assert table["optimizer.lr"] == ["0.25", "0.001"]
    assert "seed" not in table
    top1 = json.loads((run / "summary.json").read_text())["metrics"]["top1"]
    assert table["top1 %"] == [f"{100 * top1:.2f}"] * 2
    names = re.findall(r'<details class="run"><summary>(.*?)<', page.read_text())
    found = curves(page)
    assert found["Loss", names[0]] == found["Loss", names[1]] == found["Loss", "loss"]


@pytest.mark.parametrize(
    "kind", ["running", "killed", "begun", "damaged", "no eval", "supervised", "heads", "no warm-up"]
)
def test_every_kind_of_run_has_a_report(run, kind):
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["step"] <= 7]
    saved = yaml.safe_load((run / "config.yaml").read_text())
    (run / "summary.json").unlink()
    match kind:
        case "running" | "killed":
            (run / "status").write_text("running\n")
            lines[3]["loss"] = None
            starts = [line for line in read_lines(run / "history.jsonl") if line["event"] == "start"]
            (run / "history.jsonl").write_text(
                "".join(json.dumps(s) + "\n" for s in starts[: 1 + (kind == "killed")])
            )
        case "begun":
            for file in ("metrics.jsonl", "history.jsonl", "prune_plan.json", "networks.json"):
                (run / file).unlink()
            lines = []
        case "damaged":
            for file in ("history.jsonl", "prune_plan.json", "networks.json", "summary.json", "status"):
                (run / file).write_bytes(b"\xff[1, 2")
            lines = [[1], 3, {"step": "x"}, {"step": 5, "loss": math.nan, "phase": "kd"}]
        case "no eval":
            saved["data"]["eval"], saved["evaluate"] = None, {}
            lines = [line for line in lines if "loss" in line]
        case "supervised":
            saved |= {"teacher": None, "warmup": None, "kd": {"losses": [{"name": "ce"}]}}
            lines = [line | {"phase": "supervised"} for line in lines if "loss" in line]
            (run / "prune_plan.json").unlink()
        case "heads":
            saved |= {
                "stage": "heads",
                "student": None,
                "warmup": None,
                "kd": {"losses": [{"name": "ce"}]},
                "evaluate": {},
            }
            lines = [{"step": 6, "top1": 0.5, "top5": 1.0, "top1_head1": 0.25, "top1_head2": 0.5}]
        case "no warm-up":
            saved["warmup"] = None
            lines = [line | {"phase": "kd"} for line in lines]
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.write('{"step": 8, "lo')  # cut by a kill
    page = report_page.write([run], measure=False)
    text = page.read_text()
    data_of(page)
    assert "NaN" not in text
    if kind == "running":
        assert "running or killed" in text
        assert curves(page)["Loss", "loss"][3] == (4, None)
    if kind == "killed":
        assert "killed or crashed; no end was recorded" in text
    if kind == "heads":
        assert dict(rows(page))["head1"][0] == "25.00"
    if kind == "supervised":
        assert "teacher" not in dict(rows(page))


def test_what_is_no_run_is_refused_in_one_line(tmp_path, run, capsys):
    (tmp_path / "file").write_text("")
    for arguments, message in (
        ([tmp_path / "none"], "none: no such directory"),
        (
            [tmp_path / "run" / "checkpoints"],
            "there is no config.yaml in it or in its folders: give the run_dir",
        ),
        ([run, "--baseline", tmp_path / "none"], "none: no such directory"),
        ([run, "--output", tmp_path / "file" / "x.html"], "cannot be written .*: choose another --output"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["report", *map(str, arguments)])
        assert exit_.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line), line
    main(["report", str(run), "--output", str(tmp_path / "out.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'out.html'}\n"
    assert (tmp_path / "out.html").stat().st_size < 500_000


def test_a_report_of_what_is_known_needs_no_torch(run):
    report_page.write([run])
    code = (
        "import sys; from indistill.commands.cli import main; main(sys.argv[1:]); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, "report", str(run)], check=True, capture_output=True, timeout=120
    )


# --- charts -------------------------------------------------------------------------------------------------


def test_thinned_curves_keep_their_extremes_and_their_values():
    points = [(float(step), math.sin(step / 50) + (9 if step == 12_345 else 0)) for step in range(50_000)]
    points[20_000] = (20_000.0, None)
    points[30_000] = (30_000.0, -math.inf)
    kept = charts.thin(points)
    assert len(kept) <= charts.MOST_POINTS
    assert set(kept) <= set(points)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert max(y for _, y in kept) == points[12_345][1]
    assert charts.thin(points[:1000]) == points[:1000]


def test_a_long_log_is_drawn_with_the_extremes_of_each_part(run):
    """50,000 lines, with peaks in single ones."""
    log = run / "metrics.jsonl"
    lines = [line for line in read_lines(log) if "top1" in line]
    random = np.random.RandomState(0)
    steps, peaks = 50_000, random.choice(50_000, 500, replace=False)
    values = {"loss": random.rand(steps), "lr": random.rand(steps), "images_per_second": random.rand(steps)}
    values["loss"][peaks] += 5
    values["lr"][peaks] /= 100
    with log.open("w") as file:
        for step in range(steps):
            line = {"step": step + 1, "phase": "warmup 1/3" if step < 20_000 else "kd"}
            line |= {key: float(value[step]) for key, value in values.items()}
            file.write(json.dumps(line) + "\n")
            if step % 10_000 == 7:
                file.write(json.dumps({**lines[0], "step": step + 1, "top1": step / steps}) + "\n")
    page = report_page.write([run], measure=False)
    found = curves(page)
    near = 2 * steps // charts.MOST_POINTS + 2  # twice as many lines as a point stands for
    for title, name, key in (
        ("Loss", "loss", "loss"),
        ("Learning rate", "lr", "lr"),
        ("Throughput", "images/s", "images_per_second"),
    ):
        shown = np.array(found[title, name])
        at = shown[:, 0].astype(int) - 1
        assert len(shown) <= charts.MOST_POINTS
        np.testing.assert_array_equal(shown[:, 1], values[key][at])
        # Near each value that is left out, the curve has one that is as high, and one that is as low.
        for sign in (1, -1):
            drawn = np.full(steps + 2 * near, -np.inf)
            drawn[at + near] = sign * shown[:, 1]
            assert (sliding_window_view(drawn, 2 * near + 1).max(axis=1) >= sign * values[key]).all()
    assert found["Accuracy", "top1"] == [(step + 1, step / steps) for step in range(7, steps, 10_000)]
    bands = next(chart["bands"] for chart in data_of(page)["charts"] if chart["title"] == "Loss")
    assert bands == [["warmup 1/3", 0, 20_000], ["kd", 20_000, 50_000]]


def test_scores_are_the_latest_of_each_name(run):
    lines = [{"step": 1, "b/top1": 0.1, "top5": 0.3}, {"step": 2, "top1": 0.2, "b/top1": 0.4}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "summary.json").unlink()
    scores = read(run, "run").scores
    assert list(scores.items()) == [("b/top1", 0.4), ("top5", 0.3), ("top1", 0.2)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.97, 0.983), (-3, 12_345), (1e-9, 3e-9), (5, 5)])
def test_ticks_are_few_and_round(low, high):
    ticks = charts.ticks(low, high)
    assert 1 <= len(ticks) <= 6
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    assert high == low or len(ticks) >= 2


def test_colours_have_contrast():
    """By the formula of WCAG 2, in light and in dark."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = charts._STYLE.split("@media screen and (prefers-color-scheme: dark)")
    for style in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", style))
        for name, least in {"fg": 7, "muted": 7, **{f"c{i}": 4.5 for i in range(7)}, "c7": 3}.items():
            brighter, darker = sorted((luminance(colours[name]), luminance(colours["bg"])), reverse=True)
            assert (brighter + 0.05) / (darker + 0.05) >= least, name
