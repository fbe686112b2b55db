"""Scores over real small networks: against plain computations, and the same on two ranks as on one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import EPS, in_float64, pack_images, run_ranks

from indistill import config, evaluate
from indistill.data import training
from indistill.data.batch import Request
from indistill.evaluate import comparison
from indistill.evaluate.representations import information, information_flow_divergence, linear_cka
from indistill.models.network import Network
from indistill.training.start import start_accelerator

PAIRS = [(0, 0), (2, 1)]  # teacher stage, student stage
IMAGES, SAMPLES = 51, 20
FEW = 8 * EPS


class WithHeads(Network):
    """Two intermediate heads, which need not be good ones: the embedding's first entries, and its last."""

    def forward(self, images, **kwargs):
        output = super().forward(images, **kwargs)
        return output._replace(cohort=(output.embedding[:, :10], output.embedding[:, -10:]))


def network(name: str, kind: type[Network] = Network) -> Network:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10)
    return kind(net, (net.default_cfg["mean"], net.default_cfg["std"])).eval()


def all_scores(tree: dict, small: str) -> dict:
    """Every function of evaluate.py on the 51 images, and on a set of one image, which leaves a rank without
    any.
    """
    settings = config.parse(tree, "test")
    accelerator = start_accelerator(settings)
    student, teacher = network("cnn32_student", WithHeads), network("cnn32_auxiliary")
    student.train()
    whole = training.open_eval_set(settings)
    one = training.open_eval_set(config.parse({**tree, "data": {**tree["data"], "root": small}}, "test"))
    section = config.Evaluate(knn=config.Knn(k=150), linear_probe=config.LinearProbe(), retrieval=True)
    embedding, labels = evaluate.embeddings(accelerator, student, one, batch=4)
    with pytest.raises(config.UserError) as mistake:  # found by rank 0, raised by all
        evaluate.retrieval(accelerator, student, one, whole, 7)
    scores = {
        "mistake": str(mistake.value),
        "accuracy": evaluate.accuracy(accelerator, student, whole, 7),
        "accuracy of one": evaluate.accuracy(accelerator, student, one, 7),
        "embeddings of one": {"embedding": embedding.tolist(), "labels": labels.tolist()},
        "retrieval": evaluate.retrieval(accelerator, student, whole, one, 7),
        "of the bank": evaluate.bank_scores(
            accelerator,
            student,
            section=section,
            keys=section.on_bank,
            bank=training.open_bank(settings.model_copy(update={"evaluate": section})),
            sets={"all": whole, "one": one},
        ),
        "similarity": evaluate.similarity(accelerator, student, teacher, PAIRS, whole, 7, SAMPLES),
        "similarity of one": evaluate.similarity(accelerator, student, teacher, PAIRS, one, 7),
        "modes": [student.training, teacher.training],
    }
    return json.loads(json.dumps(scores))


def write_scores(tree: dict, small: str, destination: str) -> None:
    with open(destination, "a") as file:
        file.write(json.dumps(all_scores(tree, small)) + "\n")


@pytest.fixture
def small(tmp_path: Path) -> str:
    pack_images(tmp_path / "small", "eval", samples=1, per_shard=1, seed=3)
    return str(tmp_path / "small")


@pytest.fixture
def images(settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The evaluation set, uint8 [51, 3, 32, 32], and its labels."""
    batch = training.open_eval_set(settings)[Request(0, 0, 0, np.arange(IMAGES))]
    return batch.images, batch.labels


def close(a, b) -> bool:
    """Equal keys, and numbers of maps and embeddings that are computed in float64, and then rounded to
    float32.
    """
    if isinstance(a, dict):
        return list(a) == list(b) and all(close(a[key], b[key]) for key in a)
    return np.asarray(a) == pytest.approx(np.asarray(b), rel=FEW, abs=FEW**2)


@pytest.mark.portable
def test_two_ranks_score_as_one_does(float64, tree, small, tmp_path):
    expected = all_scores(tree, small)
    assert expected["mistake"] == "evaluate.retrieval: query label 1 is absent from the database"
    assert expected["modes"] == [True, False]
    assert np.shape(expected["embeddings of one"]["embedding"]) == (1, 64)
    run_ranks(in_float64, 2, write_scores, tree, small, str(tmp_path / "scores"))
    told = [json.loads(line) for line in (tmp_path / "scores").read_text().splitlines()]
    assert len(told) == 2
    assert told[0] == told[1]
    assert told[0].pop("mistake") == expected.pop("mistake")
    for key, value in expected.items():
        assert close(told[0][key], value), (key, told[0][key], value)


@torch.no_grad()
def test_accuracy_counts_every_head(settings, images):
    student = network("cnn32_student", WithHeads)
    accelerator = start_accelerator(settings)
    scores = evaluate.accuracy(accelerator, student, training.open_eval_set(settings), batch=7)
    output, labels = student(images[0]), images[1].numpy()
    expected = {}
    for name, logits in zip(("top1", "top1_head1", "top1_head2"), (output.logits, *output.cohort)):
        expected[name] = (
            sum(int(np.argmax(row)) == label for row, label in zip(logits.numpy(), labels)) / IMAGES
        )
    best = np.argsort(-output.logits.numpy(), axis=1)[:, :5]
    expected["top5"] = sum(label in row for row, label in zip(best, labels)) / IMAGES
    assert scores == pytest.approx(expected, abs=1e-12)
    without = evaluate.accuracy(
        accelerator, network("cnn32_student"), training.open_eval_set(settings), batch=7
    )
    assert without == {"top1": scores["top1"], "top5": scores["top5"]}


@pytest.mark.portable
@torch.no_grad()
def test_similarity_compares_the_maps_of_evenly_spaced_samples(float64, settings, images):
    student, teacher = network("cnn32_student"), network("cnn32_auxiliary")
    accelerator, whole = start_accelerator(settings), training.open_eval_set(settings)
    scores = evaluate.similarity(accelerator, student, teacher, PAIRS, whole, 7, SAMPLES)
    places = [i * IMAGES // SAMPLES for i in range(SAMPLES)]
    chosen, labels = images[0][places], images[1][places]
    expected, flows = {}, ([], [])
    sides = [
        [x.float() for x in (*net.maps(chosen, stages), net(chosen).embedding)]
        for net, stages in ((student, [0, 1]), (teacher, [0, 2]))
    ]
    assert sides[0][1].shape == (SAMPLES, 16, 6, 6)
    assert sides[1][1].shape == (SAMPLES, 64, 2, 2)
    for layer, x, y in zip(("pair1", "pair2", "embedding"), *sides):
        expected[f"cka_{layer}"] = linear_cka(x, y).item()
        expected[f"information_student_{layer}"] = information(x, labels).item()
        expected[f"information_teacher_{layer}"] = information(y, labels).item()
        flows[0].append(expected[f"information_student_{layer}"])
        flows[1].append(expected[f"information_teacher_{layer}"])
    expected["information_flow_divergence"] = information_flow_divergence(*map(torch.tensor, flows)).item()
    assert close(scores, expected)

    alone = evaluate.similarity(accelerator, student, teacher, [], whole, 7, SAMPLES)  # no stages to compare
    expected = {key: value for key, value in expected.items() if "embedding" in key}
    assert close(alone, expected | {"information_flow_divergence": (flows[0][-1] - flows[1][-1]) ** 2})
    itself = evaluate.similarity(accelerator, student, student, [(0, 0)], whole, 64, samples=10**6)
    assert list(itself) == [
        *("cka_pair1", "information_student_pair1", "information_teacher_pair1"),
        *("cka_embedding", "information_student_embedding", "information_teacher_embedding"),
        "information_flow_divergence",
    ]
    assert itself["cka_pair1"] == pytest.approx(1, abs=1e-9)
    assert itself["information_flow_divergence"] == 0
    assert itself["information_student_embedding"] == pytest.approx(
        information(student(images[0]).embedding.float(), images[1]).item(), rel=FEW
    )


@pytest.mark.portable
@torch.no_grad()
def test_maps_too_large_are_pooled(float64, settings, images, monkeypatch):
    student, teacher = network("cnn32_student"), network("cnn32_auxiliary")
    accelerator, whole = start_accelerator(settings), training.open_eval_set(settings)
    # The student's first map, 8 x 15 x 15, fits when halved; the teacher's, 16 x 15 x 15, when halved twice.
    monkeypatch.setattr(comparison, "_MAP_ENTRIES", IMAGES * 8 * 8 * 8)
    scores = evaluate.similarity(accelerator, student, teacher, [(0, 0)], whole, 7)
    x, y = (net.maps(images[0], [0])[0].float() for net in (student, teacher))
    small_x = torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True)
    small_y = torch.nn.functional.avg_pool2d(torch.nn.functional.avg_pool2d(y, 2, ceil_mode=True), 2)
    assert (small_x.shape[1:], small_y.shape[1:]) == ((8, 8, 8), (16, 4, 4))
    assert scores["cka_pair1"] == pytest.approx(linear_cka(small_x, small_y).item(), rel=FEW)
    assert scores["cka_pair1"] != pytest.approx(linear_cka(x, y).item(), rel=1e-4)


def test_a_layer_that_is_not_finite_is_left_out_by_name(settings, capsys):
    student, teacher = network("cnn32_student"), network("cnn32_auxiliary")
    broken = copy.deepcopy(teacher)
    broken.net.fc1.bias.data[0] = float("inf")
    accelerator, whole = start_accelerator(settings), training.open_eval_set(settings)
    scores = evaluate.similarity(accelerator, student, broken, PAIRS, whole, 7)
    expected = evaluate.similarity(accelerator, student, teacher, PAIRS, whole, 7)
    left_out = {key for key in expected if "embedding" in key} | {"information_flow_divergence"}
    assert scores == {key: value for key, value in expected.items() if key not in left_out}
    assert "embedding is not finite" in capsys.readouterr().out


def test_retrieval_is_the_two_functions_for_each_metric(settings):
    student = network("cnn32_student")
    accelerator, whole = start_accelerator(settings), training.open_eval_set(settings)
    scores = evaluate.retrieval(accelerator, student, whole, whole, 7)
    embedding, labels = evaluate.embeddings(accelerator, student, whole, 7)
    example, expected = (embedding, labels, embedding, labels), {}
    for metric in ("cosine", "l2"):
        expected[f"map_{metric}"] = evaluate.retrieval_map(*example, metric=metric)
        expected[f"map_{metric}_authors"] = evaluate.retrieval_map(
            *example, metric=metric, protocol="authors"
        )
        for k, value in evaluate.precision_at(*example, metric=metric).items():
            expected[f"precision_at_{k}_{metric}"] = value
    assert scores == expected
    assert {"precision_at_1_cosine", "precision_at_10_l2"} < scores.keys()
    assert scores["precision_at_1_l2"] == 1  # every image finds itself
    assert not any("100" in key for key in scores)  # of 51
