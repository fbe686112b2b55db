"""Measure the time of a training step, compared with a hand-written loop and with other tools.

    python benchmarks/step.py [--pairs r34_r18 ...] [--precisions fp32 bf16] [--peers FOLDER]

See benchmarks/README.md for the method. Prints its tables and writes them to
benchmarks/results/step_cpu.md or step_gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peers import distillation_box, logit_task
from report import RESULTS, heading, table
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 1000
SIZE = 224  # pixels
TEMPERATURE = 4.0
LR = 1e-3
EPOCHS = (3, 4, 5, 6)  # of the four warm-up pairs: alpha = 2
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16, dense
LIBRARIES = ("torch", "timm", "accelerate", "torchdistill")
GPU = torch.cuda.is_available()


class Pair(NamedTuple):
    teacher: str
    student: str
    cpu_batch: int
    gpu_batch: int


PAIRS = {
    "r34_r18": Pair("resnet34", "resnet18", 8, 256),
    "r50_mobilenetv3": Pair("resnet50", "mobilenetv3_large_100", 8, 128),
    "vit_s_vit_ti": Pair("vit_small_patch16_224", "vit_tiny_patch16_224", 8, 256),
}


class Job(NamedTuple):
    """One contestant on one computation, in a process of its own."""

    contestant: str
    pair: str
    precision: str  # fp32 or bf16
    stage: int | None  # timm's index of the stage that the warm-up trains, in both networks; None: KD
    batch: int
    folder: str  # of the initial weights, the same for all contestants
    peers: str | None  # folder in which torchdistill is installed
    profile: bool = False

    @property
    def phase(self) -> str:
        return "KD" if self.stage is None else f"warm-up {self.stage}"


# --- contestants: each returns a function that does one step and returns its loss ---------------------------

Step = Callable[[], Tensor]


class Parts:
    """Networks, optimizer and images of the contestants other than indistill."""

    def __init__(self, job: Job, channels_last: bool = True, fused: bool = True) -> None:
        self.job, self.device = job, torch.device("cuda" if GPU else "cpu")
        self.teacher, self.student = networks(job)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.teacher.eval().to(self.device, memory_format=layout)
        self.student.train().to(self.device, memory_format=layout)
        import timm.optim

        # Without weight decay on biases and norms, as in timm and indistill.
        self.optimizer = timm.optim.create_optimizer_v2(
            self.student, opt="momentum", lr=LR, weight_decay=1e-4, momentum=0.9, fused=fused
        )
        self.layout = layout
        torch.backends.cudnn.benchmark = True  # as in the scripts of torchdistill and timm
        known = [
            (net.pretrained_cfg["mean"], net.pretrained_cfg["std"]) for net in (self.teacher, self.student)
        ]
        assert known[0] == known[1], "one normalisation serves both networks"
        self.mean, self.std = (255 * torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in known[0])
        self.images, self.labels = synthetic(job)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Copy the uint8 images from host memory, and return them normalised, with the labels."""
        images = self.images.to(self.device, non_blocking=True)
        x = ((images.float() - self.mean) / self.std).contiguous(memory_format=self.layout)
        return x, self.labels.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.job.precision == "bf16")

    def update(self, loss: Tensor) -> Tensor:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def kd_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    student, teacher = student.float(), teacher.float()
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, 1),
        F.log_softmax(teacher / TEMPERATURE, 1),
        reduction="batchmean",
        log_target=True,
    )
    return 0.5 * F.cross_entropy(student, labels) + 0.5 * TEMPERATURE**2 * soft


def maps_upto(net: nn.Module, x: Tensor, stage: int) -> Tensor:
    return net.forward_intermediates(x, indices=[stage], stop_early=True, intermediates_only=True)[0]


def by_hand(job: Job) -> Step:
    """(a) The same computation in a minimal hand-written loop."""
    parts = Parts(job)
    if job.precision == "bf16":
        parts.teacher.bfloat16()
    dtype = next(parts.teacher.parameters()).dtype

    def step() -> Tensor:
        x, labels = parts.batch()
        with torch.inference_mode():
            seen = x.to(dtype)
            target = parts.teacher(seen) if job.stage is None else maps_upto(parts.teacher, seen, job.stage)
        target = target.clone()
        with parts.autocast():
            output = parts.student(x) if job.stage is None else maps_upto(parts.student, x, job.stage)
        loss = (
            kd_loss(output, target, labels)
            if job.stage is None
            else F.mse_loss(output.float(), target.float())
        )
        return parts.update(loss)

    return step


def every_layer(job: Job) -> Step:
    """(c) The loop by hand, with every layer of both networks computed in the warm-up."""
    parts = Parts(job)

    def step() -> Tensor:
        x, _ = parts.batch()
        with torch.inference_mode(), parts.autocast():
            target = parts.teacher.forward_intermediates(x, indices=[job.stage])[1][0]
        target = target.clone()
        with parts.autocast():
            final, (output,) = parts.student.forward_intermediates(x, indices=[job.stage])
            parts.student.forward_head(final)
        return parts.update(F.mse_loss(output.float(), target.float()))

    return step


def as_published(job: Job) -> Step:
    """(c') Like (c), with gradients for the teacher and a second, pruned pass of each stage's last layer.

    The published code does both at every step. This version is for ResNets of basic blocks.
    """
    parts = Parts(job)
    stages = {1: "layer1", 2: "layer2", 3: "layer3", 4: "layer4"}
    seen: dict[str, Tensor] = {}
    for name in stages.values():
        block = parts.teacher.get_submodule(name)[-1]
        block.register_forward_hook(lambda _, inputs, __, name=name: seen.update({f"{name}.in": inputs[0]}))
        block.conv2.register_forward_hook(
            lambda _, inputs, __, name=name: seen.update({f"{name}.h": inputs[0]})
        )
    widths = {name: parts.student.get_submodule(name)[-1].conv2.out_channels for name in stages.values()}

    def pruned(name: str) -> Tensor:
        block = parts.teacher.get_submodule(name)[-1]
        kept = slice(0, widths[name])
        h = F.conv2d(seen[f"{name}.h"], block.conv2.weight[kept], padding=1)
        norm = block.bn2
        h = F.batch_norm(
            h, norm.running_mean[kept], norm.running_var[kept], norm.weight[kept], norm.bias[kept]
        )
        return F.relu(h + seen[f"{name}.in"][:, kept])

    def step() -> Tensor:
        x, _ = parts.batch()
        with parts.autocast():
            parts.teacher(x)
            targets = {stage: pruned(name) for stage, name in stages.items()}
            final, (output,) = parts.student.forward_intermediates(x, indices=[job.stage])
            parts.student.forward_head(final)
        loss = parts.update(F.mse_loss(output.float(), targets[job.stage].float()))
        parts.teacher.zero_grad()
        return loss

    return step


def timm_task(job: Job, channels_last: bool = False) -> Step:
    """(e) timm's LogitDistillationTask, used as in its train.py; by default without channels_last."""
    parts = Parts(job, channels_last=channels_last, fused=False)
    task = logit_task(parts.teacher, parts.student, parts.device, weight=0.5, temperature=TEMPERATURE)

    def step() -> Tensor:
        x, labels = parts.batch()
        with parts.autocast():
            loss = task(x, labels)["loss"]
        return parts.update(loss)

    return step


def torchdistill(job: Job, channels_last: bool = False) -> Step:
    """(d) torchdistill's DistillationBox, used as in its image_classification.py and KD example."""
    sys.path += [job.peers] if job.peers else []
    parts = Parts(job, channels_last=channels_last)
    optimizer = {"key": "SGD", "kwargs": {"lr": LR, "momentum": 0.9, "weight_decay": 1e-4}}
    box = distillation_box(
        parts.teacher, parts.student, parts.device, optimizer, weight=0.5, temperature=TEMPERATURE
    )

    def step() -> Tensor:
        x, labels = parts.batch()
        with parts.autocast():
            loss = box.forward_process(x, labels, None)
        box.post_forward_process(loss=loss)
        loss.item()  # its script logs the loss at every step
        return loss.detach()

    return step


# On a GPU only: the parts of a step, and possible optimisations of the loop by hand.


def teacher_alone(job: Job) -> Step:
    parts = Parts(job)
    parts.teacher.to(torch.bfloat16 if job.precision == "bf16" else torch.float32)
    dtype = next(parts.teacher.parameters()).dtype

    def step() -> Tensor:
        with torch.inference_mode():
            return parts.teacher(parts.batch()[0].to(dtype)).float().mean()

    return step


def student_alone(job: Job) -> Step:
    parts = Parts(job)

    def step() -> Tensor:
        x, labels = parts.batch()
        with parts.autocast():
            output = parts.student(x)
        return parts.update(F.cross_entropy(output.float(), labels))

    return step


def with_overlap(job: Job) -> Step:
    """Run the teacher on the next batch in a stream of its own, during the student's step on this batch."""
    parts = Parts(job)
    parts.teacher.bfloat16()
    side = torch.cuda.Stream()
    main = torch.cuda.current_stream()
    ready: list[tuple[Tensor, Tensor, Tensor]] = []

    def look_ahead() -> None:
        side.wait_stream(main)
        with torch.cuda.stream(side), torch.inference_mode():
            x, labels = parts.batch()
            ready.append((x, labels, parts.teacher(x.bfloat16())))

    def step() -> Tensor:
        if not ready:
            look_ahead()
        main.wait_stream(side)
        x, labels, target = (tensor.clone() for tensor in ready.pop())
        look_ahead()
        with parts.autocast():
            output = parts.student(x)
        return parts.update(kd_loss(output, target, labels))

    return step


def with_graphed_teacher(job: Job) -> Step:
    """Replay the teacher's pass as a CUDA graph."""
    parts = Parts(job)
    parts.teacher.bfloat16()
    held = parts.batch()[0].bfloat16()
    with torch.no_grad():
        for _ in range(3):
            parts.teacher(held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            target = parts.teacher(held)

    def step() -> Tensor:
        x, labels = parts.batch()
        held.copy_(x)
        graph.replay()
        with parts.autocast():
            output = parts.student(x)
        return parts.update(kd_loss(output, target, labels))

    return step


def compiled_by_hand(job: Job) -> Step:
    parts = Parts(job)
    if job.precision == "bf16":
        parts.teacher.bfloat16()
    dtype = next(parts.teacher.parameters()).dtype
    teacher, student = torch.compile(parts.teacher), torch.compile(parts.student)

    def step() -> Tensor:
        x, labels = parts.batch()
        with torch.no_grad():
            target = teacher(x.to(dtype))
        with parts.autocast():
            output = student(x)
        return parts.update(kd_loss(output, target, labels))

    return step


BY_HAND: dict[str, Callable[[Job], Step]] = {
    "by hand": by_hand,
    "by hand, every layer": every_layer,
    "as published": as_published,
    "timm task": timm_task,
    "timm task, channels_last": lambda job: timm_task(job, channels_last=True),
    "torchdistill": torchdistill,
    "torchdistill, channels_last": lambda job: torchdistill(job, channels_last=True),
    "teacher alone": teacher_alone,
    "student alone": student_alone,
    "by hand, teacher ahead in a stream": with_overlap,
    "by hand, teacher as a CUDA graph": with_graphed_teacher,
    "by hand, compiled": compiled_by_hand,
}
OURS = {"indistill": {}, "indistill, compiled": {"compile": True}}


def networks(job: Job) -> tuple[nn.Module, nn.Module]:
    import timm
    from safetensors.torch import load_model

    pair = PAIRS[job.pair]
    nets = []
    for role, name in (("teacher", pair.teacher), ("student", pair.student)):
        nets.append(timm.create_model(name, num_classes=CLASSES))
        load_model(nets[-1], f"{job.folder}/{job.pair}-{role}.safetensors")
    return nets[0], nets[1]


def synthetic(job: Job) -> tuple[Tensor, Tensor]:
    """Return images (uint8 [B, 3, 224, 224]) and labels (int64 [B]) in host memory, the same for all."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (job.batch, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    labels = torch.randint(CLASSES, (job.batch,), generator=generator)
    return (images.pin_memory(), labels.pin_memory()) if GPU else (images, labels)


# --- processes ----------------------------------------------------------------------------------------------


def clock() -> float:
    if GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()  # counts all threads; there is one


def turns(pipe: Connection, peaks: list[int]) -> Iterator[None]:
    """Yield once for each step that the parent requests, and time or profile the steps of each turn.

    The peak of memory is appended to `peaks` after each timed turn. It is reset after the first turn, which
    allocates memory and fills caches.
    """
    for number, (count, recorded) in enumerate(iter(pipe.recv, None)):
        if number == 1:
            reset_peak()
        with torch.profiler.profile() if recorded else contextlib.nullcontext() as profiler:
            begin = clock()
            yield from itertools.repeat(None, count)
            seconds = clock() - begin
        if not recorded:  # the profiler itself keeps memory
            peaks.append(torch.cuda.max_memory_allocated() if GPU else resident("VmHWM"))
        pipe.send(operators(profiler) if recorded else seconds)


def operators(profiler: torch.profiler.profile) -> str:
    sort = "self_cuda_time_total" if GPU else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=sort, row_limit=15, max_name_column_width=40)


def reset_peak() -> None:
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Return this process's resident bytes: now for "VmRSS", peak since `reset_peak` for "VmHWM".

    getrusage's ru_maxrss would include the memory of the parent at the time when it started this process.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def work(job: Job, pipe: Connection) -> None:
    """Take turns in a contestant's process, then send its first loss and its peak memory to the parent."""
    import timm  # noqa: F401, so that all contestants have the same imports before the first measurement

    import indistill.training.loop  # noqa: F401

    torch.set_num_threads(1)
    before = resident("VmRSS")
    first: list[Tensor] = []
    peaks: list[int] = []
    if job.contestant in OURS:
        ours(job, turns(pipe, peaks), first)
    else:
        step = BY_HAND[job.contestant](job)
        for _ in turns(pipe, peaks):
            loss = step()
            if not first:
                first.append(loss)
    pipe.send({"loss": first[0].item(), "bytes": peaks[-1] - (0 if GPU else before)})
    os._exit(0)


class Stopped(Exception):
    """Raised by the data loader after the last turn."""


def ours(job: Job, asked: Iterator[None], first: list[Tensor]) -> None:
    """(b) `indistill.training.loop.train`, with a loader that repeats one batch and waits for its turns."""
    from indistill import Callback, config
    from indistill.data.batch import Batch
    from indistill.training import loop
    from indistill.training.parts import Sources

    images, labels = synthetic(job)
    batch = Batch(images, labels, torch.arange(job.batch), [])

    class Synthetic:
        steps_per_epoch, fingerprint, dataset = 10**6, "synthetic", None

        def loader(self, *_: Any, **__: Any) -> Iterator[Batch]:
            for _ in asked:
                yield batch
            raise Stopped

    class SyntheticSources(Sources):
        def data(self, *_: Any) -> tuple[Any, None]:
            return Synthetic(), None

    class FirstLoss(Callback):
        def on_step(self, run: Any, *_: Any) -> None:
            if not first:
                first.append(run.loss)

    pair = PAIRS[job.pair]
    networks = {
        role: {"name": name, "checkpoint": f"{job.folder}/{job.pair}-{role}.safetensors"}
        for role, name in (("teacher", pair.teacher), ("student", pair.student))
    }
    with tempfile.TemporaryDirectory() as run_dir:
        tree = {
            "run_dir": run_dir,
            "duration": "1e9 steps",
            "data": {
                "train": "none",
                "num_classes": CLASSES,
                "global_batch": job.batch,
                "streams": job.batch,
            },
            **networks,
            "warmup": None if job.stage is None else {"pairs": [[job.stage] * 2], "durations": ["1e9 steps"]},
            "kd": {
                "losses": [
                    {"name": "ce", "weight": 0.5},
                    {"name": "kd", "weight": 0.5, "temperature": TEMPERATURE},
                ]
            },
            "optimizer": {"name": "momentum", "lr": LR, "momentum": 0.9, "weight_decay": 1e-4},
            "mixed_precision": {"fp32": "no"}.get(job.precision, job.precision),
            "checkpoint": {"every_steps": None},
            "trackers": [],
            **OURS[job.contestant],
        }
        with contextlib.suppress(Stopped), contextlib.redirect_stdout(sys.stderr):
            loop.train(config.parse(tree, "step.py"), "auto", SyntheticSources(), [FirstLoss()])


class Result(NamedTuple):
    job: Job
    seconds: list[float]  # per step, one value for each round
    loss: float
    bytes: int
    profile: str

    @property
    def images_per_second(self) -> float:
        return self.job.batch / statistics.median(self.seconds)


def play(jobs: list[Job], arguments: argparse.Namespace) -> list[Result]:
    """Launch all contestants several times: the memory layout can slow a process down by some per cent."""
    launches = [launch(jobs, arguments.rounds, arguments.steps) for _ in range(arguments.launches)]
    return [
        of_job[0]._replace(
            seconds=[seconds for result in of_job for seconds in result.seconds],
            bytes=int(statistics.median(result.bytes for result in of_job)),
        )
        for of_job in zip(*launches)
    ]


def launch(jobs: list[Job], rounds: int, steps: int) -> list[Result]:
    """Run each contestant in its own process. They take turns of `steps` steps, in random order."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for job in jobs:
        pipe, other = context.Pipe()
        process = context.Process(target=work, args=(job, other), daemon=True)
        process.start()
        other.close()  # so that `recv` raises EOFError if the child dies
        pipes.append(pipe)
        processes.append(process)
    seconds: list[list[float]] = [[] for _ in jobs]
    for number in range(rounds + 1):  # the first round is a warm-up
        for i in random.sample(range(len(jobs)), len(jobs)):  # nosec B311  # the order of measurements is no secret
            pipes[i].send((steps if number else 2, False))
            taken = pipes[i].recv() / steps
            if number:
                seconds[i].append(taken)
        print(
            f"{jobs[0].pair} {jobs[0].precision} {jobs[0].phase}: round {number} of {rounds}", file=sys.stderr
        )
    results = []
    for job, pipe, process, of_job in zip(jobs, pipes, processes, seconds):
        profile = ""
        if job.profile:
            pipe.send((5, True))
            profile = pipe.recv()
        pipe.send(None)
        measured = pipe.recv()
        process.join()
        results.append(Result(job, of_job, measured["loss"], measured["bytes"], profile))
    check_losses(results)
    return results


def check_losses(results: list[Result]) -> None:
    """Raise SystemExit if the contestants' losses on the first batch differ."""
    reference = next((result for result in results if result.job.contestant == "by hand"), None)
    for result in results:
        if reference is None or result.job.contestant.endswith(" alone"):
            continue
        close = 1e-4 if result.job.precision == "fp32" else 3e-2
        peer = result.job.contestant.startswith(("timm", "torchdistill"))
        if result.job.precision == "bf16" and not GPU and peer:
            # On CPUs autocast leaves the peers' log_softmax in bf16, where a small divergence is mostly lost.
            close = 0.1
        if abs(result.loss - reference.loss) > close * abs(reference.loss):
            raise SystemExit(f"{result.job}: first loss {result.loss}, by hand {reference.loss}")


# --- what is compared ---------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    precisions = ["bf16"] if GPU else ["fp32", "bf16"]
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=precisions)
    parser.add_argument(
        "--batch", type=int, help="images per step (default: 128 or 256 on a GPU, 8 on a CPU)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--launches",
        type=int,
        default=1 if GPU else 3,
        help="launches of each process, with `--rounds` rounds each",
    )
    parser.add_argument("--steps", type=int, default=10 if GPU else 1, help="steps per turn")
    parser.add_argument(
        "--peers",
        help="folder in which torchdistill is installed: pip install --no-deps --target FOLDER torchdistill",
    )
    parser.add_argument("--compile", action="store_true", help="also measure KD with compile: true")
    parser.add_argument("--out", default=f"step_{'gpu' if GPU else 'cpu'}", help="name of the result files")
    parser.add_argument("--no-warmup", action="store_true", help="measure only KD")
    parser.add_argument("--profile", action="store_true", help="also list the operators that take longest")
    arguments = parser.parse_args()
    sys.path += [arguments.peers] if arguments.peers else []
    random.seed(0)
    command = f"python benchmarks/step.py {' '.join(sys.argv[1:])}".strip()
    parts = [heading("A training step", command, LIBRARIES), METHOD]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.pairs:
            save_weights(name, folder)
            for precision in arguments.precisions:
                for part in compare(name, precision, folder, arguments, results):
                    parts.append(part)
                    write(arguments.out, parts, results)  # at once, in case the benchmark is interrupted
    print("\n".join(parts))


def write(name: str, parts: list[str], results: list[Result]) -> None:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.md"
    file.write_text("\n".join(parts))
    record = [
        {**result._asdict(), "job": result.job._asdict() | {"folder": "", "peers": ""}} for result in results
    ]
    file.with_suffix(".json").write_text(json.dumps(record) + "\n")


METHOD = """Each contestant is a process. They take turns, in another order each round. Figures are medians;
ratios are formed within a round. On a CPU the measure is processor time with one thread; memory is the
highest resident set during the timed steps, less that after the imports.
"""


def compare(
    name: str, precision: str, folder: str, arguments: argparse.Namespace, all_results: list[Result]
) -> Iterator[str]:
    """Yield each part of the report on one pair when it is ready; append the results to `all_results`."""
    batch = arguments.batch or (PAIRS[name].gpu_batch if GPU else PAIRS[name].cpu_batch)
    pair = PAIRS[name]

    def job(contestant: str, stage: int | None = None) -> Job:
        recorded = arguments.profile and contestant in ("by hand", "indistill", "by hand, every layer")
        return Job(contestant, name, precision, stage, batch, folder, arguments.peers, recorded)

    kd = ["by hand", "indistill", "timm task", "timm task, channels_last"]
    has_torchdistill = importlib.util.find_spec("torchdistill") is not None
    if has_torchdistill:
        kd += ["torchdistill", "torchdistill, channels_last"]
    if arguments.compile:
        kd += ["indistill, compiled", "by hand, compiled"]
    if GPU:
        kd += ["by hand, teacher ahead in a stream", "by hand, teacher as a CUDA graph"]
        kd += ["teacher alone", "student alone"]
    results = play([job(contestant) for contestant in kd], arguments)
    all_results += results
    title = f"## {pair.teacher} to {pair.student}, {precision}, batches of {batch}\n"
    yield from (title, "### KD\n", contest(results))
    if not has_torchdistill:
        yield "torchdistill: not installed here (`--peers`).\n"
    yield from targets_of_kd(results)
    yield from profiles(results)
    if name == "r34_r18" and not arguments.no_warmup:
        yield from warmup(job, arguments, all_results)


def warmup(
    job: Callable[[str, int], Job], arguments: argparse.Namespace, all_results: list[Result]
) -> list[str]:
    """Compare the four pairs of the warm-up with the three other ways to compute them."""
    contestants = ["by hand", "indistill", "by hand, every layer", "as published"]
    phases = {}
    for stage in (1, 2, 3, 4):
        jobs = [job(contestant, stage) for contestant in contestants]
        phases[stage] = play(jobs, arguments)
        all_results += phases[stage]
    predicted = {stage: [operations(result.job) for result in phases[stage]] for stage in phases}
    rows = []
    for stage, results in phases.items():
        ratios = [ratio(result, results[1]) for result in results]
        counted = [of_one / predicted[stage][1] for of_one in predicted[stage]]
        rows.append([f"{stage} ({EPOCHS[stage - 1]} epochs)", f"{results[1].images_per_second:.1f}"])
        rows[-1] += [f"{ratios[i]:.2f} ({counted[i]:.2f})" for i in (0, 2, 3)]
    whole, counted = (
        [sum(e * of_stage[i] for e, of_stage in zip(EPOCHS, per_stage)) for i in range(4)]
        for per_stage in (
            [[statistics.median(result.seconds) for result in results] for results in phases.values()],
            list(predicted.values()),
        )
    )
    rows.append(
        ["whole", ""] + [f"{whole[i] / whole[1]:.2f} ({counted[i] / counted[1]:.2f})" for i in (0, 2, 3)]
    )
    columns = ["pair", "indistill, images/s", "by hand (limit)", "every layer (c)", "as published (c')"]
    first = [ratio(phases[1][i], phases[1][1]) for i in range(4)]
    verdicts = [
        verdict("the four pairs against (c)", whole[2] / whole[1], 1.2),
        verdict("the four pairs against (c')", whole[3] / whole[1], 1.9),
        verdict("the first pair against (c)", first[2], 2.4),
        verdict("the first pair against (c')", first[3], 3.0),
    ]
    return [
        "### Warm-up: time of a step, relative to indistill's (in brackets: by operations)\n",
        table(columns, rows),
        *verdicts,
        *profiles(phases[1]),  # the pair with the highest goal
    ]


def profiles(results: list[Result]) -> list[str]:
    return [f"```\n{result.job.contestant}\n{result.profile}\n```\n" for result in results if result.profile]


def contest(results: list[Result]) -> str:
    ours = next(result for result in results if result.job.contestant == "indistill")
    rows = []
    for result in results:
        flops = operations(result.job) * result.images_per_second
        peak = next(
            (peak for name, peak in PEAK_FLOPS.items() if GPU and name in torch.cuda.get_device_name()), None
        )
        share = f"{flops / 1e9:.0f}" if peak is None else f"{flops / 1e12:.0f} T, {flops / peak:.0%} of peak"
        rows.append([result.job.contestant, f"{result.images_per_second:.1f}", f"{ratio(result, ours):.3f}"])
        rows[-1] += [f"{result.bytes / 2**20:.0f}", share]
    return table(["", "images/s", "time relative to indistill", "peak memory, MiB", "GFLOP/s"], rows)


def targets_of_kd(results: list[Result]) -> list[str]:
    by_name = {result.job.contestant: result for result in results}
    ours, hand = by_name["indistill"], by_name["by hand"]
    verdicts = [verdict("KD against the loop by hand", ratio(hand, ours), 0.97)]
    for peer in ("torchdistill", "torchdistill, channels_last", "timm task", "timm task, channels_last"):
        if peer in by_name:
            verdicts.append(verdict(f"KD against {peer}", ratio(by_name[peer], ours), 1.1))
    return [
        *verdicts,
        verdict("peak memory against the loop by hand, at most", ours.bytes / hand.bytes, 1.05, most=True),
    ]


def verdict(title: str, measured: float, goal: float, most: bool = False) -> str:
    """Return a line that compares `measured` with the goal: at least `goal`, or at most if `most`."""
    met = measured <= goal if most else measured >= goal
    outcome = "met" if met else f"not met, missed by {abs(measured / goal - 1):.1%}"
    return f"- {title}: {measured:.3f}, goal {goal}: {outcome}"


def ratio(theirs: Result, ours: Result) -> float:
    """Return their time divided by ours, the median over the rounds."""
    return statistics.median(a / b for a, b in zip(theirs.seconds, ours.seconds))


_counted: dict[tuple, float] = {}


def operations(job: Job) -> float:
    """Count the FLOP per image of a step of the loop by hand, a multiply-add as two."""
    from torch.utils.flop_counter import FlopCounterMode

    same = "by hand" if job.contestant not in ("by hand, every layer", "as published") else job.contestant
    same = job.contestant if job.contestant.endswith(" alone") else same
    key = (job.pair, same, job.stage)
    if key not in _counted:
        step = BY_HAND[same](job._replace(precision="fp32", batch=2))
        with FlopCounterMode(display=False) as counter:
            step()
        _counted[key] = counter.get_total_flops() / 2
    return _counted[key]


def save_weights(name: str, folder: str) -> None:
    """Save random initial weights for all contestants; their values do not affect the time."""
    import timm
    from safetensors.torch import save_model

    torch.manual_seed(0)
    for role, model in (("teacher", PAIRS[name].teacher), ("student", PAIRS[name].student)):
        save_model(timm.create_model(model, num_classes=CLASSES), f"{folder}/{name}-{role}.safetensors")


if __name__ == "__main__":
    main()
