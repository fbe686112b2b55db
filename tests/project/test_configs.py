"""Every config in configs/ can be built with random weights and computes the loss of a batch."""

import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from indistill.config import runs
from indistill.config.run_dir import RunDir
from indistill.curriculum import Timetable
from indistill.data.batch import Batch
from indistill.losses.objective import Objective
from indistill.models import timm_model
from indistill.models.heads import Heads
from indistill.training import lessons, optim, parts

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SAMPLES = {"imagenet": 1_281_167, "cifar10": 50_000, "digits": 1_437}  # training images
SAMPLES |= {"dinov3": 1_281_167, "clip": 1_281_167}
COMPARED = [path for path in CONFIGS if path.stem.startswith(("imagenet_r34", "imagenet_r50"))]
SEEN = 2  # images of a batch

every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def opening_comment(path):
    return re.split(r"^(?!#)", path.read_text(), maxsplit=1, flags=re.MULTILINE)[0]


def commands(path):
    """The arguments of each `indistill train` in the opening comment: the config's path, then overrides."""
    lines = re.sub(r"\\\n# *", "", opening_comment(path))  # continued lines joined
    return [shlex.split(arguments) for arguments in re.findall(r"indistill train (.*)", lines)]


def test_there_are_configs():
    assert len(CONFIGS) >= 10
    assert len(COMPARED) == 6


@every_config
def test_the_opening_comment_tells_commands_cost_and_result(path):
    opening = opening_comment(path)
    assert ". " in opening.splitlines()[0] + " "  # `indistill init` lists the first sentence of this line
    assert commands(path)
    assert all(config == f"configs/{path.name}" for config, *_ in commands(path))
    assert "Expected: " in opening
    assert re.search(r"\d %", opening)
    assert re.search(r"Cost: \d|minute", opening)


@every_config
def test_the_commands_overrides_are_keys_and_each_has_its_run_directory(path):
    loaded = [runs.load(path, overrides) for _, *overrides in commands(path)]
    run_dirs = [settings.run_dir for stages in loaded for _, settings in stages]
    assert len(set(run_dirs)) == len(run_dirs)


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_recipes_are_compared_with_and_without_warmup_at_an_equal_budget(path):
    [(_, with_warmup)], [(_, without)] = (runs.load(path, overrides) for _, *overrides in commands(path))
    assert with_warmup.warmup is not None
    assert without.warmup is None
    changed = {"run_dir": "", "warmup": None}
    assert with_warmup.model_copy(update=changed) == without.model_copy(update=changed)


PUBLIC = (
    "imagenet1k-train-{0000..1023}.tar",
    "imagenet1k-validation-{00..63}.tar",
)  # of timm/imagenet-1k-wds


@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path.stem.startswith("imagenet")], ids=lambda path: path.stem
)
def test_recipes_for_imagenet_name_the_public_shards(path):
    hub = ["data.root=hf://datasets/timm/imagenet-1k-wds", "data.cache_dir=cache"]
    for overrides in ([], hub):
        for _, settings in runs.load(path, overrides):
            assert (settings.data.train, settings.data.eval) == PUBLIC


def test_the_page_about_data_names_the_shards_that_its_commands_write():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert all(f"`{name}`" in page for name in PUBLIC)
    written = set(re.findall(r"shards pack .* shards/(\S+/) .*--prefix (\S+)", page))
    named = re.findall(r"^  (?:train|eval): (\w+/)(\S+?)-[{*]", page, re.MULTILINE)
    assert len(named) == 2
    assert set(named) <= written


@pytest.fixture(scope="module")
def create_once():
    """A `timm_model.create` without weights that creates each network once; many configs share them."""
    networks = {}

    def create(section, num_classes, image_size, role):
        section = section.model_copy(update={"pretrained": False, "checkpoint": None})
        key = (role, section.name, str(section.kwargs), num_classes, image_size)
        if key not in networks:
            networks[key] = create_network(section, num_classes, image_size, role)
        return networks[key].float()  # a run before may hold a teacher in half precision

    create_network = timm_model.create
    return create


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def with_and_without_warmup():
    """Each config, and again without its warm-up; where its networks are large, that is slow."""
    for path in CONFIGS:
        yield pytest.param(path, True, id=f"{path.stem}-as-it-is")
        if any(settings.warmup for _, settings in runs.load(path)):
            marks = pytest.mark.slow if SAMPLES[path.stem.split("_")[0]] > 100_000 else ()
            yield pytest.param(path, False, id=f"{path.stem}-warmup-null", marks=marks)


@pytest.mark.parametrize(("path", "with_warmup"), with_and_without_warmup())
def test_a_config_builds_and_computes_its_losses(
    path, with_warmup, create_once, accelerator, tmp_path, monkeypatch
):
    stages = runs.load(path)
    if not with_warmup:
        stages = [(name, settings.model_copy(update={"warmup": None})) for name, settings in stages]
    heads_of = {Path(settings.run_dir, "heads.safetensors"): settings for _, settings in stages}
    monkeypatch.setattr(timm_model, "create", create_once)
    monkeypatch.setattr(Heads, "load", lambda file, *_: parts.heads(accelerator, heads_of[Path(file)]))
    for name, settings in stages:
        (tmp_path / name).mkdir(exist_ok=True)
        check_stage(path, settings, accelerator, tmp_path / name)


@torch.no_grad()
def check_stage(path, settings, accelerator, run_dir):
    size, classes, warmup = settings.data.image_size, settings.data.num_classes, settings.warmup
    torch.manual_seed(0)
    images = torch.randint(256, (SEEN, 3, size, size), dtype=torch.uint8)
    labels = torch.tensor([0, classes - 1])
    batch = Batch(images, labels, labels, [])
    student, targets_of, plan, places = lessons.networks(
        accelerator, settings, files=RunDir(run_dir), calibration=lambda batches: [batch]
    )

    assert len(plan.pairs) >= 3 if warmup else not plan.pairs
    for pair in plan.pairs:
        kept = pair.teacher_width if pair.kept is None else len(pair.kept)
        assert kept == min(pair.teacher_width, pair.student_width)

    samples = next(count for prefix, count in SAMPLES.items() if path.stem.startswith(prefix))
    timetable = Timetable.of(settings, samples // settings.data.global_batch, len(plan.pairs))
    *before, last = timetable.curriculum.phases()
    assert last.name == ("kd" if settings.has_teacher else "supervised")
    assert last.start < timetable.total_steps / 2
    assert bool(before) == bool(warmup)
    assert settings.data.global_batch % settings.data.streams == 0

    phase_optim = optim.PhaseOptim(optim.create(student, settings.optimizer), settings, timetable)
    for phase in (*before, last):
        middle = (phase.start + (phase.end or timetable.total_steps)) // 2
        own = (settings.warmup if phase.pairs else settings.kd).lr
        assert 0 < phase_optim.begin_step(middle, phase) <= (own or settings.optimizer.lr)

    scope = settings.kd.relational_scope
    objective = Objective(settings.losses, timetable.steps_per_epoch, scope, places=places)
    mixed = torch.nn.functional.one_hot(labels, classes).float() if settings.kd.mix else labels
    student.train()
    for phase in (*before[-1:], last):  # the deepest maps, and all of the networks
        targets = targets_of(images, phase)
        output = student(images, upto=phase.upto, pairs=phase.pairs, targets=targets)
        loss, terms = objective(output, targets, labels=mixed, phase=phase, step=phase.start)
        assert 0 < loss.item() < math.inf
        assert len(terms) == len(phase.pairs or settings.losses)
    logits = student.eval()(images).logits
    headless = settings.student is not None and 0 in (classes, settings.student.num_classes)
    assert logits is None if headless else logits.shape == (SEEN, classes)
