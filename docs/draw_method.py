"""Draw the pictures of method.md into images/, from a run on the demo's digits.

Run `make demo` first; its data and teacher are used. This script trains the demo's student again in
runs/method, with a checkpoint and an evaluation every epoch, in half a minute on two cores. An existing run
is not repeated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import set_seed

from indistill import config, prune
from indistill.commands.export.load import load_file
from indistill.commands.plan import estimate
from indistill.curriculum import Phase, Timetable
from indistill.data.batch import Request
from indistill.data.training import open_eval_set
from indistill.models.network import Network, normalisation
from indistill.models.stages import find_stages
from indistill.prune import Plan
from indistill.training import loop, parts

IMAGES = Path(__file__).with_name("images")
EVERY_EPOCH = [
    "run_dir=runs/method",
    "evaluate.every=1 epoch",
    "checkpoint.every_steps=44",
    "checkpoint.keep_last=100",
]
WIDTH = 760  # pixels
DIGIT = 3  # index of the test image whose maps are drawn
# A page may be light or dark, so each picture has its own background and both sets of colours.
STYLE = """
.ground{fill:#fff}.ink{fill:#1f2328}.dim{fill:#59636e}.rule{stroke:#d1d9e0;fill:none}.off{fill:#eef1f4;stroke:#d1d9e0}
.teacher{fill:#8250df}.student{fill:#1a7f37}.rest{fill:#afb8c1}.join{stroke:#bc4c00;fill:#bc4c00}.on{fill:#fff}
.p0{stroke:#bc4c00}.p1{stroke:#1a7f37}.p2{stroke:#0969da}.p3{stroke:#8250df}.all{stroke:#1f2328}
.b0{fill:#bc4c0022}.b1{fill:#1a7f3722}.b2{fill:#0969da22}.b3{fill:#8250df22}.b4{fill:#59636e18}
@media (prefers-color-scheme:dark){
.ground{fill:#0d1117}.ink{fill:#f0f6fc}.dim{fill:#9198a1}.rule{stroke:#3d444d;fill:none}.off{fill:#161b22;stroke:#3d444d}
.teacher{fill:#8957e5}.student{fill:#238636}.rest{fill:#57606a}.join{stroke:#f0883e;fill:#f0883e}.on{fill:#fff}
.p0{stroke:#f0883e}.p1{stroke:#3fb950}.p2{stroke:#4493f8}.p3{stroke:#ab7df8}.all{stroke:#f0f6fc}
.b0{fill:#f0883e33}.b1{fill:#3fb95033}.b2{fill:#4493f833}.b3{fill:#ab7df833}.b4{fill:#9198a122}}
text{font:12px system-ui,sans-serif}.small{font-size:11px}
path{fill:none;stroke-width:1.8}
"""
# Colours of a map's values, from zero to the target's largest value, for taught and for other channels.
COLOURS = ("#440154", "#46307e", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#fde725")
GREYS = (
    "#7d859020",
    "#7d859030",
    "#7d859040",
    "#7d859050",
    "#7d859060",
    "#7d859070",
    "#7d859080",
    "#7d859090",
)


class Run(NamedTuple):
    settings: config.Config
    teacher: Network
    plan: Plan
    timetable: Timetable
    phases: list[Phase]
    lines: list[dict[str, float]]  # of metrics.jsonl

    def student(self, step: int) -> Network:
        """Return the student after `step` steps; at step 0, initialised as by `lessons.networks`."""
        if step == 0:
            set_seed(self.settings.seed)
            net = parts.create_student(self.settings)
            return Network(net, normalisation(net, self.settings.student, "student")).eval()
        file = Path(self.settings.run_dir, f"checkpoints/step-{step:08d}/model.safetensors")
        return load_file(self.settings, file).eval()

    def end(self, phase: Phase) -> int:
        return phase.end or self.timetable.total_steps


class Picture:
    """Builds an SVG. Coordinates are pixels; `y` of a text is its base line."""

    def __init__(self, name: str, title: str) -> None:
        self.name = name
        self.parts = [f"<title>{title}</title>"]

    def text(self, x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{words}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, corner: float = 0) -> None:
        self.parts.append(
            f'<rect x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" '
            f'rx="{corner}" class="{kind}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "rule") -> None:
        self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>')

    def curve(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        self.parts.append(f'<path class="{kind}" d="M{" L".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')

    def maps(
        self, x: float, y: float, width: float, maps: np.ndarray, kept: Sequence[int] | None = None
    ) -> float:
        """Draw maps [C, H, W] with values in 0..1 side by side, in grey if not kept. Returns the height.

        Each colour is one path, because not every Git forge shows images inside an SVG.
        """
        channels, tall, wide = maps.shape
        across = 2 ** math.ceil(math.log2(channels) / 2)
        gap = wide / 8
        cells: dict[str, list[str]] = {}
        levels = np.round(maps.clip(0, 1) * (len(COLOURS) - 1)).astype(int)
        for channel, of_channel in enumerate(levels):
            down, right = divmod(channel, across)
            left, top = right * (wide + gap), down * (tall + gap)
            colours = COLOURS if kept is None or channel in kept else GREYS
            cells.setdefault(colours[0], []).append(f"M{left:g} {top:g}h{wide}v{tall}h-{wide}z")
            for row, column in zip(*of_channel.nonzero()):
                colour = colours[of_channel[row, column]]
                cells.setdefault(colour, []).append(f"M{left + column:g} {top + row:g}h1v1h-1z")
        scale = width / (across * (wide + gap) - gap)
        self.parts.append(f'<g transform="translate({x:g} {y:g}) scale({scale:.4f})">')
        ground_first = sorted(cells.items(), key=lambda item: item[0] not in (COLOURS[0], GREYS[0]))
        self.parts += [
            f'<path style="fill:{colour};stroke:none" d="{"".join(d)}"/>' for colour, d in ground_first
        ]
        self.parts.append("</g>")
        return scale * (channels // across * (tall + gap) - gap)

    def save(self, height: float) -> None:
        ground = f'<rect width="{WIDTH}" height="{height:g}" rx="6" class="ground"/>'
        IMAGES.mkdir(exist_ok=True)
        (IMAGES / f"{self.name}.svg").write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" '
            f'width="{WIDTH}" role="img">'
            f"<style>{STYLE}</style>{ground}\n" + "\n".join(self.parts) + "\n</svg>\n"
        )


def main() -> None:
    settings = config.load("configs/digits_demo.yaml", EVERY_EPOCH)
    if not Path(settings.run_dir, "summary.json").exists():
        loop.train(settings)
    teacher = parts.create_teacher(settings).eval()
    plan = Plan.read(Path(settings.run_dir, "prune_plan.json"))
    lines = [json.loads(line) for line in Path(settings.run_dir, "metrics.jsonl").read_text().splitlines()]
    timetable = Timetable.of(settings, steps_per_epoch=44, pairs=len(plan.pairs))
    run = Run(settings, teacher, plan, timetable, timetable.curriculum.phases(), lines)
    for draw in (layers, timetable_bars, importance, maps, curves):
        draw(run)
    print(f"drawn: {', '.join(sorted(path.name for path in IMAGES.glob('*.svg')))}")


# --- the pictures -------------------------------------------------------------------------------------------


def layers(run: Run) -> None:
    """Draw the layers of both networks that each phase computes."""
    picture = Picture("layers", "The layers of teacher and student that are computed in each phase")
    teacher, student = find_stages(run.teacher.net), find_stages(run.student(0).net)
    left, step, width, height = 128, 104, 92, 22
    for i, stage in enumerate(teacher):
        picture.text(left + i * step + width / 2, 20, stage.name.replace("act1", "stem"), "dim", "middle")
    picture.text(left + len(teacher) * step + width / 2, 20, "classifier", "dim", "middle")
    top = 34
    for phase in run.phases:
        pair = run.plan.pairs[phase.pairs[0]] if phase.pairs else None
        depths = (pair.teacher_stage, pair.student_stage) if pair else (len(teacher), len(student))
        epochs = (run.end(phase) - phase.start) / run.timetable.steps_per_epoch
        picture.text(12, top + 27, "KD" if phase.name == "kd" else phase.name)
        picture.text(12, top + 43, f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'}", "dim small")
        for row, (role, stages, depth) in enumerate(
            (("teacher", teacher, depths[0]), ("student", student, depths[1]))
        ):
            y = top + 42 * row
            for i in range(len(stages) + 1):
                on = i <= depth
                picture.box(left + i * step, y, width, height, role if on else "off", 3)
                words = f"{stages[i].channels} ch." if i < len(stages) else "10"
                picture.text(
                    left + i * step + width / 2, y + 15, words, "on small" if on else "dim small", "middle"
                )
            picture.text(left - 8, y + 15, role, "dim small", "end")
        for stage in [pair.teacher_stage] if pair else [len(teacher)]:
            x = left + stage * step + width / 2
            picture.line(x, top + height, x, top + 42, "join")
            words = f"MSE, {pair.student_width} kept" if pair else "CE, KL"
            picture.text(x - 6, top + 36, words, "ink small", "end")
        top += 86
        picture.line(12, top - 11, WIDTH - 12, top - 11)
    picture.save(top - 6)


def timetable_bars(run: Run) -> None:
    """Draw each phase's share of the steps and of the operations."""
    picture = Picture("timetable", "Share of each phase in the steps and in the operations of the run")
    costs = estimate.of_run(run.settings, 1, None, {}).phases
    steps = [cost.steps for cost in costs]
    # per image, in millions
    flops = [(cost.work.teacher_flops + cost.work.student_flops) / 1e6 for cost in costs]
    work = [one * count for one, count in zip(flops, steps)]
    left, width = 110, WIDTH - 122
    rows = (
        ("steps", steps, [str(count) for count in steps]),
        ("operations", work, [f"{one:.0f} M" for one in flops]),
    )
    for row, (name, amounts, words) in enumerate(rows):
        x, y = left, 12 + 46 * row
        picture.text(12, y + 21, name)
        for i, amount in enumerate(amounts):
            share = width * amount / sum(amounts)
            picture.box(x, y, share, 32, f"b{i}")
            picture.text(
                x + share / 2, y + 14, "KD" if i == len(amounts) - 1 else str(i + 1), "ink small", "middle"
            )
            picture.text(x + share / 2, y + 27, words[i], "dim small", "middle")
            x += share
    picture.text(
        left,
        118,
        "operations of both networks on an image, the student's with backward, in millions",
        "dim small",
    )
    picture.save(128)


def importance(run: Run) -> None:
    """Draw the L1 norm of each teacher channel, and which channels are kept."""
    picture = Picture("importance", "Importance of each teacher channel by pair, kept channels in colour")
    size = config.input_size(run.settings)
    top, height = 14, 64
    left, width = 128, WIDTH - 144
    for i, pair in enumerate(run.plan.pairs):
        norms = prune.l1_importance(run.teacher.net, pair.teacher_stage, size).numpy()
        low, high, kept = norms.min(), norms.max(), set(pair.kept)
        name = find_stages(run.teacher.net)[pair.teacher_stage].name
        picture.text(12, top + 14, f"pair {i + 1}, {name}")
        picture.text(12, top + 31, f"{len(kept)} of {len(norms)} kept", "dim small")

        def y_of(norm: float, top: float = top, low: float = low, high: float = high) -> float:
            return top + height * (1 - (norm - low) / (high - low))

        line = y_of(min(norms[channel] for channel in kept))
        picture.line(left, line, left + width, line)
        for channel, norm in enumerate(norms):
            kind = "teacher" if channel in kept else "rest"
            x = left + width * (channel + 0.5) / len(norms)
            picture.parts.append(f'<circle cx="{x:.1f}" cy="{y_of(norm):.1f}" r="3" class="{kind}"/>')
        picture.text(left - 8, top + 8, f"{high:.1f}", "dim small", "end")
        picture.text(left - 8, top + height + 2, f"{low:.1f}", "dim small", "end")
        top += height + 26
    picture.text(
        left,
        top,
        "L1 norm of the filters that write a channel, channels in the order of the layer",
        "dim small",
    )
    picture.save(top + 12)


@torch.no_grad()
def maps(run: Run) -> None:
    """Draw maps of one test digit: the teacher's, the target, and the student's before and after."""
    picture = Picture(
        "maps", "Maps of one digit: the teacher's, the pruned target, the student's before and after"
    )
    request = Request(epoch=0, step=0, first_row=0, ids=np.array([DIGIT]))
    image = torch.as_tensor(open_eval_set(run.settings)[request].images)  # uint8 [1, 3, 32, 32]
    columns, side, top = (100, 272, 436, 600), 148, 20
    for x, words in zip(
        columns, ("teacher, taught in colour", "target", "student, before", "after its phase")
    ):
        picture.text(x, top, words, "dim small")
    top += 10
    picture.maps(12, top, 64, image[0, :1].numpy() / 255)
    for i, (pair, phase) in enumerate(zip(run.plan.pairs, run.phases)):
        whole = run.teacher.maps(image, [pair.teacher_stage])[0][0]  # [C_t, H, W]
        target = whole[pair.kept]  # [C_s, H, W]
        stage = [pair.student_stage]
        bright = target.max().item()
        before, after = (run.student(step).maps(image, stage)[0][0] for step in (0, run.end(phase)))
        shown = zip(columns, (whole, target, before, after), (pair.kept, None, None, None))
        height = max(picture.maps(x, top, side, (one / bright).numpy(), kept) for x, one, kept in shown)
        sides = f"{target.shape[1]} x {target.shape[2]}"
        errors = [
            f"error {((one - target).square().mean() / target.square().mean()).sqrt():.0%}"
            for one in (before, after)
        ]
        captions = [f"{len(whole)} maps of {sides}", f"{len(target)} of them", *errors]
        for x, words in zip(columns, captions):
            picture.text(x, top + height + 14, words, "dim small")
        picture.text(12, top + (84 if i == 0 else 12), f"pair {i + 1}")
        top += height + 34
    picture.save(top - 10)


def curves(run: Run) -> None:
    """Draw the loss of each logged step, and the CKA of each pair at each evaluation, over the epochs."""
    picture = Picture("curves", "Loss and CKA of each pair over the epochs, phases as bands")
    left, width, per_epoch = 64, WIDTH - 130, run.timetable.steps_per_epoch
    epochs = run.timetable.total_steps / per_epoch

    def x_of(step: float) -> float:
        return left + width * step / run.timetable.total_steps

    top, height = 30, 150
    for i, phase in enumerate(run.phases):
        picture.box(
            x_of(phase.start), top, x_of(run.end(phase)) - x_of(phase.start), 2 * height + 40, f"b{i}"
        )
        name = "KD" if phase.name == "kd" else phase.name.removeprefix("warmup ")
        picture.text((x_of(phase.start) + x_of(run.end(phase))) / 2, top - 8, name, "dim small", "middle")

    losses = [line for line in run.lines if "loss" in line]
    low = math.floor(math.log10(min(line["loss"] for line in losses)))
    high = math.ceil(math.log10(max(line["loss"] for line in losses)))
    picture.text(12, top + 12, "loss")
    for power in range(low, high + 1):
        y = top + height * (high - power) / (high - low)
        picture.line(left, y, left + width, y)
        picture.text(left - 6, y + 4, f"{10.0**power:g}", "dim small", "end")
    for i, phase in enumerate(run.phases):
        points = [line for line in losses if phase.start < line["step"] <= run.end(phase)]
        scaled = [
            (x_of(p["step"]), top + height * (high - math.log10(p["loss"])) / (high - low)) for p in points
        ]
        picture.curve(scaled, f"p{i}" if phase.pairs else "all")

    top += height + 40
    picture.text(12, top + 12, "CKA")
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = top + height * (1 - value)
        picture.line(left, y, left + width, y)
        picture.text(left - 6, y + 4, f"{value:g}", "dim small", "end")
    ends = []
    for i in range(len(run.plan.pairs)):
        key = f"cka_pair{i + 1}"
        points = [(x_of(line["step"]), top + height * (1 - line[key])) for line in run.lines if key in line]
        picture.curve(points, f"p{i}")
        ends.append((points[-1][1], i))
    y = 0.0
    for end, i in sorted(ends):  # labels beside the curves, not on each other
        y = max(end + 4, y + 14)
        picture.text(left + width + 6, y, f"pair {i + 1}", "ink small")
        picture.line(left + width + 44, y - 4, left + width + 60, y - 4, f"p{i}")
    for epoch in range(int(epochs) + 1):
        picture.text(x_of(epoch * per_epoch), top + height + 16, str(epoch), "dim small", "middle")
    picture.text(left + width / 2, top + height + 32, "epochs", "dim small", "middle")
    picture.save(top + height + 42)


if __name__ == "__main__":
    main()
