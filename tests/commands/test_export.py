"""Exports: others load the run's student, bit for bit or to the last digits, and its description."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from conftest import EPS, move, refused
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from indistill import config
from indistill.commands.cli import main
from indistill.commands.evaluate import evaluate_checkpoint
from indistill.commands.export import write
from indistill.commands.export.load import load_for_eval
from indistill.commands.export.write import export
from indistill.config import UserError
from indistill.data import shards
from indistill.models import timm_model
from indistill.models.network import Network, normalisation, save_network
from indistill.models.views import EvalView, evaluation_view
from indistill.training import checkpoint, parts
from indistill.training.loop import train

MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 1.0)  # of no timm model


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a moving average far from the weights, and a student with its own normalisation."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    tree = {
        "run_dir": str(run_dir),
        "duration": "96 steps",
        "data": {
            "root": str(data_dir), "train": "train-*.tar", "eval": "eval-*.tar", "num_classes": 10,
            "image_size": 32, "global_batch": 32, "streams": 8, "in_memory": True, "eval_crop": 1.0,
            "augment": {"recipe": "none", "flip": False},
        },
        "student": {"name": "cnn32_student", "mean": MEAN, "std": STD},
        "teacher": {"name": "cnn32_auxiliary", "random": True},
        "warmup": {"curriculum": "sequential", "durations": ["4 steps", "4 steps", "5 steps"]},
        "kd": {"losses": [{"name": "ce"}, {"name": "kd", "weight": 0.05}]},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "ema": {"decay": 0.9},
        "checkpoint": {"every_steps": 32, "keep_last": 3},
        "evaluate": {"every": "32 steps", "similarity_samples": 0},
        "trackers": [],
    }  # fmt: skip
    train(config.parse(tree, "test"))
    return run_dir


@pytest.fixture
def run_copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def settings_of(run: Path) -> config.Config:
    return config.load(run / "config.yaml")


def pictures(run: Path) -> tuple[list[Image.Image], list[int]]:
    """The evaluation images as any other program reads them."""
    section = settings_of(run).data
    samples = list(shards.ShardSet(section.eval, section.root).iterate())
    return [Image.open(io.BytesIO(s.image)).convert("RGB") for s in samples], [s.label for s in samples]


def top1(logits: torch.Tensor, labels: list[int]) -> float:
    return (logits.argmax(dim=1) == torch.tensor(labels)).float().mean().item()


def told(capsys) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.mark.parametrize("form", ["timm", "onnx", "torch"])
def test_a_student_without_a_classifier(data_dir, tmp_path, capsys, form):
    """Its embeddings are those of the run, in every format; timm loads it with num_classes=0."""
    run_dir, folder = tmp_path / "run", tmp_path / "student"
    tree = yaml.safe_load(HEADLESS.format(run_dir=run_dir, data_dir=data_dir))
    train(config.parse(tree, "test"))
    main(["export", str(run_dir), str(folder), "--format", form])
    assert "On 16 images of data.eval its embeddings are within" in capsys.readouterr().out
    network = load_for_eval(settings_of(run_dir), str(run_dir))[0].eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(0))
    with torch.no_grad():
        expected = network(images)
    assert expected.logits is None
    card = (folder / "README.md").read_text()
    assert ModelCard(card).data.pipeline_tag == "image-feature-extraction"
    assert "without a classifier" in card
    if form == "timm":
        net = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
        with torch.no_grad():
            assert torch.equal(net(network.normalise(images)), expected.embedding)
        assert timm.create_model(f"local-dir:{folder}", pretrained=True).num_classes == 0
    elif form == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        (embeddings,) = session.run(["embeddings"], {"images": images.numpy()})
        np.testing.assert_allclose(embeddings, expected.embedding, rtol=1e-4, atol=1e-5)
    if form != "torch":  # a program of torch is not loaded for evaluation
        loaded = load_for_eval(settings_of(run_dir), str(folder))[0].eval()
        assert torch.allclose(loaded(images).embedding, expected.embedding, rtol=1e-4, atol=1e-5)
        with pytest.raises(UserError, match=r"has no classifier to evaluate: set evaluate\.knn"):
            evaluate_checkpoint(settings_of(run_dir), str(folder))


HEADLESS = """
run_dir: {run_dir}
duration: 2 steps
data:
  {{root: {data_dir}, train: train-*.tar, eval: eval-*.tar, num_classes: 10, image_size: 32, global_batch: 32,
   streams: 8, in_memory: true, eval_crop: 1.0}}
student: {{name: cnn32_student, num_classes: 0}}
teacher: {{name: test_vit, num_classes: 0, random: true, image_size: 48}}
kd: {{losses: [{{name: feature}}]}}
optimizer: {{name: adamw, lr: 1.0e-2}}
evaluate: {{similarity_samples: 0}}
trackers: []
"""


def test_timm_loads_it(trained, tmp_path, capsys):
    """By timm alone: classes, normalisation, preprocessing and top-1 are those of the evaluation."""
    folder = tmp_path / "deep" / "student"
    main(["export", str(trained), str(folder)])
    assert (
        f"exported the moving average of step 96 to {folder}. On 16 images of data.eval"
        in capsys.readouterr().out
    )
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert (
        len({path.stat().st_mode for path in folder.iterdir()}) == 1
    )  # readable by whoever may read the others
    assert list(folder.parent.iterdir()) == [folder]

    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert (net.num_classes, net.pretrained_cfg["num_classes"], net.fc2.out_features) == (10, 10, 10)
    preprocessing = timm.data.resolve_model_data_config(net)
    assert json.loads(json.dumps(preprocessing)) == {  # timm gives tuples or lists
        "input_size": [3, 32, 32], "interpolation": "bilinear", "mean": [*MEAN], "std": [*STD],
        "crop_pct": 1.0, "crop_mode": "center",
    }  # fmt: skip
    expected = load_file(trained / "student.safetensors")
    assert net.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())

    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3).fc2.out_features == 3

    transform = timm.data.create_transform(**preprocessing)
    images, labels = pictures(trained)
    with torch.no_grad():
        score = top1(net(torch.stack([transform(image) for image in images])), labels)
    summary = json.loads((trained / "summary.json").read_text())
    assert score == pytest.approx(summary["metrics"]["top1"], abs=EPS)
    assert score > 0.5  # of ten classes: it has learned something that could be lost

    main(["eval", str(trained / "config.yaml"), str(folder), "--json"])
    assert told(capsys) == summary["metrics"]
    main(["eval", str(trained / "config.yaml"), f"local-dir:{folder}"])
    table = capsys.readouterr().out.strip().splitlines()[-2:]
    assert [line.split() for line in table] == [
        [name, f"{100 * summary['metrics'][name]:.2f}", "%"] for name in ("top1", "top5")
    ]


@pytest.mark.portable
@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_programs_give_the_checkpoints_scores(trained, tmp_path, form, capsys):
    folder = tmp_path / "student"
    main(["export", str(trained), str(folder), "--format", form])
    images, labels = pictures(trained)
    pixels = np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])  # uint8 [51, 3, 32, 32]
    extra = {"metadata.json": ""}
    if form == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        metadata = {
            k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items() if k != "pkg"
        }
        run = lambda batch: session.run(["logits"], {"images": batch})[0]  # noqa: E731
    else:
        program = torch.export.load(folder / "model.pt2", extra_files=extra).module()
        metadata = json.loads(extra["metadata.json"])
        run = lambda batch: program(torch.from_numpy(batch)).detach().numpy()  # noqa: E731
    assert metadata.items() >= {
        "num_classes": 10, "image_size": 32, "crop_pct": 1.0, "crop_mode": "center",
        "interpolation": "bilinear", "mean": list(MEAN), "std": list(STD), "weights": "ema", "step": 96,
    }.items()  # fmt: skip

    # The checkpoint by hand: timm's network under its own names, the normalisation in float64.
    net = timm.create_model("cnn32_student", num_classes=10).double().eval()
    net.load_state_dict(load_file(trained / "student.safetensors"))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    with torch.no_grad():
        x = (torch.from_numpy(pixels).double() / 255 - mean) / std
        expected = net(x).numpy()
        move(net.parameters(), EPS, seed=0)
        limit = 8 * np.abs(net(x).numpy() - expected).max()  # what rounding in float32 may come to
    for batch in (1, 2, 51):
        np.testing.assert_allclose(run(pixels[:batch]), expected[:batch], rtol=0, atol=limit)

    summary = json.loads((trained / "summary.json").read_text())
    assert top1(torch.from_numpy(run(pixels)), labels) == pytest.approx(summary["metrics"]["top1"], abs=EPS)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    assert ("load only files that you trust" in code) == (form == "torch")
    scope = {"images": pixels[:5] if form == "onnx" else torch.from_numpy(pixels[:5])}
    exec(code.replace("FOLDER", str(folder)), scope)
    assert scope["logits"].shape == (5, 10)
    if form == "torch":
        with pytest.raises(
            UserError, match=r"model\.pt2: is a program, and loading one can run arbitrary code"
        ):
            evaluate_checkpoint(settings_of(trained), str(folder))
        return
    assert evaluate_checkpoint(settings_of(trained), str(folder)) == summary["metrics"]
    with pytest.raises(UserError, match="has no embeddings for retrieval"):
        evaluate_checkpoint(config.load(trained / "config.yaml", ["evaluate.retrieval=true"]), str(folder))
    with pytest.raises(UserError, match=r"has 10 classes, data.num_classes is 12"):
        load_for_eval(config.load(trained / "config.yaml", ["data.num_classes=12"]), str(folder))
    with pytest.raises(UserError, match=r"was exported for images of another size than data.image_size .48."):
        load_for_eval(config.load(trained / "config.yaml", ["data.image_size=48"]), str(folder))


def test_the_card_says_what_it_is(trained, tmp_path):
    export(trained, tmp_path / "student")
    card = ModelCard.load(tmp_path / "student" / "README.md")  # as the Hub reads it
    assert card.data.library_name == "timm"
    assert card.data.tags == ["image-classification", "knowledge-distillation", "indistill", "timm"]
    text = card.text
    assert "Weights: moving average (decay 0.9), after 96 steps of training." in text
    assert "**Teacher.** cnn32_auxiliary, with random weights." in text
    assert (
        "teacher stage to student stage 0 to 0 (8 of 16 channels), 1 to 1 (16 of 32 channels), 2 to 2 (32 of"
        in text
    )
    assert "losses: ce (weight 1), kd (weight 0.05); 96 steps in all." in text
    scores = json.loads((trained / "summary.json").read_text())["metrics"]
    assert {name: float(value) for name, value in re.findall(r"\| (\w+) \| ([\d.e-]+) \|", text)} == {
        name: float(f"{value:.4g}") for name, value in scores.items()
    }
    assert f"`indistill export {trained} {tmp_path}/student --format timm --weights ema`" in text

    # Its recipe is the run's.
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*)```", text, re.DOTALL)[1])
    settings = settings_of(trained)
    recipe |= {"run_dir": settings.run_dir, "data": {**recipe["data"], "root": settings.data.root}}
    assert config.parse(recipe, "card") == settings

    # Its Python runs.
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert "import indistill.models" in code
    scope = {"image": pictures(trained)[0][0]}
    exec(code.replace("FOLDER", str(tmp_path / "student")), scope)
    assert scope["logits"].shape == (1, 10)


def test_raw_weights_and_earlier_checkpoints(trained, tmp_path, monkeypatch):
    last = trained / "checkpoints" / "step-00000096"
    source = export(trained, tmp_path / "raw", weights="raw")
    assert (source.weights, source.step, source.scores) == ("raw", 96, {})
    raw, average = (load_file(last / f"{name}.safetensors") for name in ("model", "ema"))
    exported = load_file(tmp_path / "raw" / "model.safetensors")
    assert all(torch.equal(value, raw[f"net.{name}"]) for name, value in exported.items())
    assert not torch.equal(exported["fc2.weight"], average["net.fc2.weight"])
    assert "These weights were not evaluated" in (tmp_path / "raw" / "README.md").read_text()

    (tmp_path / "earlier").mkdir()
    monkeypatch.chdir(tmp_path)
    export(trained, "earlier", step="step-00000064")
    assert "--checkpoint step-00000064`" in (tmp_path / "earlier" / "README.md").read_text()
    assert evaluate_checkpoint(settings_of(trained), str(trained)) == evaluate_checkpoint(
        settings_of(trained), str(last)
    )
    earlier = trained / "checkpoints" / "step-00000064"
    assert evaluate_checkpoint(settings_of(trained), str(tmp_path / "earlier")) == evaluate_checkpoint(
        settings_of(trained), str(earlier)
    )


def test_an_unfinished_run(run_copy, tmp_path, capsys):
    (run_copy / "summary.json").unlink()
    (run_copy / "student.safetensors").unlink()
    source = export(run_copy, tmp_path / "student")
    assert not source.finished
    assert source.file == run_copy / "checkpoints" / "step-00000096" / "ema.safetensors"
    assert f"{run_copy} is not finished; exported the moving average of step 96" in capsys.readouterr().out
    assert (
        "after 96 steps of a run that had not finished." in (tmp_path / "student" / "README.md").read_text()
    )


def test_on_a_machine_without_the_shards(run_copy, tmp_path, capsys):
    """Compared on random images; the names of the classes, if it has them."""
    tree = yaml.safe_load((run_copy / "config.yaml").read_text())
    tree["data"]["root"] = str(tmp_path)
    (run_copy / "config.yaml").write_text(yaml.safe_dump(tree))
    names = [f"animal {i}" for i in range(10)]
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": names}))
    export(run_copy, tmp_path / "student")
    net = timm.create_model(f"local-dir:{tmp_path}/student", pretrained=True)
    assert net.pretrained_cfg["label_names"] == names
    out = capsys.readouterr().out
    assert re.search(
        r"compared on random images, because data.eval cannot be read: .*eval-\*.tar: no such shard", out
    )
    assert "On 16 random images its logits are within 0.0e+00 of the run's." in out


@pytest.mark.parametrize(
    ("name", "kwargs", "forms"),
    [
        ("test_efficientnet.r160_in1k", {}, ["timm", "torch"]),
        ("test_vit.r160_in1k", {"img_size": 64, "depth": 2}, ["timm", "onnx", "torch"]),
    ],
)
def test_other_networks(trained, tmp_path, name, kwargs, forms):
    """A network with pretrained weights of its own, of which nothing is claimed for these."""
    settings = config.load(
        trained / "config.yaml",
        [
            f"student={{name: {name}, kwargs: {json.dumps(kwargs)}}}",
            "data.image_size=64",
            "data.eval_crop=0.9",
        ],
    )
    torch.manual_seed(0)
    net = timm_model.create(settings.student, 10, 64, "student")
    (tmp_path / "run").mkdir()
    network = Network(net, normalisation(net, settings.student, "student"))
    save_network(network, settings.student, tmp_path / "run" / "student.safetensors")
    (tmp_path / "run" / "config.yaml").write_text(config.dump(settings))
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"step": 96, "metrics": {}}))
    for form in forms:
        export(tmp_path / "run", tmp_path / form, form=form)
    loaded = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True)
    preprocessing = timm.data.resolve_model_data_config(loaded, use_test_size=True)
    assert json.loads(json.dumps(preprocessing)) == {  # timm gives tuples or lists
        "input_size": [3, 64, 64], "interpolation": "bilinear", "mean": [*net.default_cfg["mean"]],
        "std": [*net.default_cfg["std"]], "crop_pct": 0.9, "crop_mode": "center",
    }  # fmt: skip
    record = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert not {"tag", "license", "label_names", "origin_url", "hf_hub_id"} & record["pretrained_cfg"].keys()
    assert record["architecture"] == name.split(".")[0]


@pytest.mark.parametrize("form", ["timm", "onnx"])
def test_interpolation_and_crop_go_along(trained, tmp_path, form):
    """As evaluation showed images to the student, so is its export described, and evaluated by any config."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    said = ["data.eval_interpolation=bicubic", "data.eval_crop=0.9"]
    (run / "config.yaml").write_text(config.dump(config.load(trained / "config.yaml", said)))
    export(run, tmp_path / "student", form=form)
    assert (
        "resized to 35 pixels (bicubic), the centre of 32 x 32"
        in (tmp_path / "student" / "README.md").read_text()
    )
    anyone = config.load(trained / "config.yaml", ["data.eval_crop=auto"])
    _, view = load_for_eval(anyone, str(tmp_path / "student"))
    assert view == EvalView("bicubic", 0.9, "center", tuple(MEAN))
    _, view = load_for_eval(anyone, str(run))  # a run's weights are the config's student's
    assert view[:3] == ("bilinear", 1.0, "center")


def test_mistakes_are_one_line(run_copy, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    destination = tmp_path / "student"

    def line(*arguments: object) -> str:
        told = refused(capsys, "export", run_copy, destination, *arguments)
        assert not destination.exists()
        assert not list(tmp_path.glob(".partial*"))
        return told

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "full: exists and is not an empty folder" in refused(capsys, "export", run_copy, tmp_path / "full")
    assert "file: exists and is not an empty folder" in refused(
        capsys, "export", run_copy, tmp_path / "full" / "file"
    )
    assert "cannot be written" in refused(capsys, "export", run_copy, tmp_path / "full" / "file" / "below")
    assert "has no config.yaml" in refused(capsys, "export", tmp_path, destination)
    assert "has no such checkpoint: choose one of: step-0" in line("--checkpoint", "step-00000003")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert "pip install 'indistill[export]'" in line("--format", "onnx")
    with monkeypatch.context() as patch:
        patch.setattr(
            write, "_check", lambda *_, **__: (_ for _ in ()).throw(UserError("nothing exported: ..."))
        )
        assert "nothing exported" in line()

    weights = run_copy / "checkpoints" / "step-00000096" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    assert re.search(
        r"step-00000096: damaged .*choose another with --checkpoint: .*step-00000064",
        line("--weights", "raw"),
    )
    (run_copy / "student.safetensors").write_bytes(b"\0" * 100)
    assert "is not a readable checkpoint" in line()
    (run_copy / "summary.json").write_text("{")
    assert "summary.json: damaged or edited by hand" in line()
    shutil.rmtree(run_copy / "checkpoints")
    assert "has no checkpoint, which --weights raw needs" in line("--weights", "raw")
    (run_copy / "summary.json").unlink()
    assert "has no student.safetensors and no checkpoint: train it first" in line()

    text = (run_copy / "config.yaml").read_text()
    tree = yaml.safe_load(text)
    (run_copy / "config.yaml").write_text(yaml.safe_dump(tree | {"ema": None}))
    assert "has no moving average (ema): use --weights raw" in line("--weights", "ema")
    heads = tree | {"stage": "heads", "student": None, "warmup": None, "kd": {"losses": [{"name": "ce"}]}}
    (run_copy / "config.yaml").write_text(yaml.safe_dump(heads))
    assert "stage: heads trains no student" in line()


def test_only_its_own_unfinished_exports_are_deleted(trained, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {
        "student": True, f".partial-student.{ended.pid}.0123abcd": True,
        ".partial-student": False, ".partial-student.mine": False,
        f".partial-student.{os.getpid()}.0123abcd": False,
        f".partial-students.{ended.pid}.0123abcd": False,
    }  # fmt: skip
    for name in names:
        (tmp_path / name).mkdir()
    for name in list(names)[1:]:
        (tmp_path / name / "file").touch()
    export(trained, tmp_path / "student")
    assert (tmp_path / "student" / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {
        "student",
        *(n for n, ours in names.items() if not ours),
    }


def test_eval_of_a_timm_model(trained, monkeypatch, tmp_path):
    """With its own weights and normalisation, whatever the config's student is; a path goes before a name."""
    settings = settings_of(trained)
    net = timm.create_model("cnn32_auxiliary", num_classes=10).eval()
    created = []

    def create(name: str, pretrained: bool, **kwargs: Any) -> torch.nn.Module:
        created.append((name, pretrained, kwargs))
        return net

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.chdir(tmp_path)
    scores = [evaluate_checkpoint(settings, name) for name in ("timm:cnn32_auxiliary", "cnn32_auxiliary")]
    assert created == [("cnn32_auxiliary", True, {})] * 2
    images, labels = pictures(trained)
    pixels = torch.stack(
        [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]
    )  # [51, 3, 32, 32]
    mean, std = (torch.tensor(net.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        net.eval()
        assert scores[0]["top1"] == pytest.approx(top1(net((pixels / 255 - mean) / std), labels), abs=EPS)
    assert scores[0] == scores[1]
    Path("cnn32_auxiliary").write_bytes(b"weights")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_for_eval(settings, "cnn32_auxiliary")


def test_an_export_is_a_teacher_and_a_student(trained, tmp_path, capsys):
    """Weights, normalisation, preprocessing and class names come from the folder; and it can be exported."""
    folder = tmp_path / "first"
    export(trained, folder)
    tree = settings_of(trained).model_dump(mode="json")
    tree |= {"run_dir": str(tmp_path / "run"), "duration": "15 steps", "evaluate": {}, "ema": None}
    tree["data"] |= {"eval_crop": "auto", "eval_interpolation": "auto"}
    tree["student"] = tree["teacher"] = {"name": f"local-dir:{folder}", "pretrained": True}
    settings = config.parse(tree, "test")
    exported = load_file(folder / "model.safetensors")
    teacher, student = parts.create_teacher(settings), parts.create_student(settings)
    for net in (teacher.net, student):
        assert all(torch.equal(value, exported[key]) for key, value in net.state_dict().items())
    assert normalisation(student, settings.student, "student") == ([*MEAN], [*STD])
    assert (teacher.mean.flatten() / 255).tolist() == pytest.approx(MEAN)
    assert evaluation_view(settings).crop_pct == 1.0

    train(settings)
    second = tmp_path / "second"
    export(tmp_path / "run", second)
    again = timm.create_model(f"local-dir:{second}", pretrained=True).state_dict()
    ours = load_file(tmp_path / "run" / "student.safetensors")
    assert all(torch.equal(again[key], ours[key]) for key in ours)
    assert any(not torch.equal(again[key], exported[key]) for key in ours)  # it was trained
    card = (second / "README.md").read_text()
    assert "Training started with the weights of first." in card
    assert "**Teacher.** local-dir:first, with the weights of first." in card
    assert str(tmp_path / "first") not in card
    capsys.readouterr()
    main(["eval", str(tmp_path / "run" / "config.yaml"), str(second), "--json"])
    assert told(capsys)["top1"] == json.loads((tmp_path / "run/summary.json").read_text())["metrics"]["top1"]


@pytest.mark.parametrize(
    ("section", "error"),
    [
        ({"name": "cnn32_student", "checkpoint": "EXPORT"}, "is a folder: for an export, set .*=local-dir:"),
        (
            {"name": "EXPORT", "pretrained": True},
            "timm has no model '.*': for the folder of an export, name loc",
        ),
        (
            {"name": "local-dir:EXPORT/gone", "pretrained": True},
            "/gone is no folder: name a folder that `indi",
        ),
        ({"name": "local-dir:RUN", "pretrained": True}, "/run has no config.json: name a folder that `indis"),
        (
            {"name": "cnn32_student", "checkpoint": "RUN"},
            "is a folder: name a file, such as .*/student.safet",
        ),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_folder_in_the_wrong_key_is_told_the_right_one(trained, tmp_path, role, section, error, capsys):
    export(trained, tmp_path / "export")
    tree = settings_of(trained).model_dump(mode="json") | {"run_dir": str(tmp_path / "new")}
    places = {"EXPORT": str(tmp_path / "export"), "RUN": str(trained)}
    for place, path in places.items():
        section = {
            key: value.replace(place, path) if value is not True else value for key, value in section.items()
        }
    tree[role] = section
    (tmp_path / "new.yaml").write_text(yaml.safe_dump(tree))
    capsys.readouterr()
    line = refused(capsys, "train", tmp_path / "new.yaml")
    assert re.search(rf"error: {role}\.(name|checkpoint): .*{error}", line)
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path / "new.yaml")])
    assert re.search(rf"FAIL  weights: {role}\.(name|checkpoint): .*{error}", capsys.readouterr().out)


def test_eval_of_a_run_that_is_not_finished_says_what_is_there(run_copy, tmp_path):
    settings = settings_of(run_copy)
    (run_copy / "student.safetensors").unlink()
    (run_copy / "status").write_text("failed\nCUDA out of memory\n")
    with pytest.raises(UserError) as caught:
        load_for_eval(settings, str(run_copy))
    last = run_copy / "checkpoints" / "step-00000096"
    assert str(caught.value) == (
        f"{run_copy}: has no student.safetensors, as its training has not finished (status: failed (CUDA out "
        "of memory)); it has the checkpoints step-00000032, step-00000064, step-00000096: evaluate one, such "
        f"as {last}, or go on training"
    )
    load_for_eval(settings, str(last))
    shutil.rmtree(run_copy / "checkpoints")
    with pytest.raises(UserError, match=f"{run_copy}: has no student.safetensors and no checkpoint yet"):
        load_for_eval(settings, str(run_copy))
    with pytest.raises(UserError, match="is no run itself, and contains the runs run: name"):
        load_for_eval(settings, str(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(
        UserError, match=r"neither a run nor an export \(it contains notes.txt\): name another"
    ):
        load_for_eval(settings, str(tmp_path / "other"))


def test_what_eval_cannot_load(trained, tmp_path):
    settings = settings_of(trained)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"onnx: has no readable onnx export "):
        load_for_eval(settings, str(tmp_path / "onnx"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^eval: timm could not create local-dir:[^()]*$"):
        load_for_eval(settings, str(tmp_path))
    with pytest.raises(UserError, match=r"no file gone.safetensors"):
        load_for_eval(settings, "gone.safetensors")
    assert checkpoint.damaged(trained / "checkpoints" / "step-00000096") is None
