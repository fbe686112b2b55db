"""Config files of several runs: stages and students, merged and checked before any training."""

from __future__ import annotations

from pathlib import Path

import pytest
from chains import load, written_out

from indistill.commands.cli import main
from indistill.config import UserError

# --- what the stages are ------------------------------------------------------------------------------------


def test_a_plain_config_is_one_stage_without_a_name(tree, settings):
    assert load(tree) == [("", settings)]
    assert load(tree, "seed=5") == [("", settings.model_copy(update={"seed": 5}))]


def test_a_stage_is_what_is_shared_and_its_own(chain):
    assert load(chain) == written_out(chain)


def test_null_and_lists_replace(chain):
    chain["data"]["window"] = 7
    chain["kd"] = {"losses": [{"name": "ce", "weight": 2.0}], "mix": {"mixup": 0.5}}
    chain["stages"][1]["data"] = {"window": None, "augment": {"flip": False}}
    chain["stages"][1]["kd"] = {"losses": [{"name": "kd"}], "mix": None}
    teacher, auxiliary, _ = (settings for _, settings in load(chain))
    assert (teacher.data.window, auxiliary.data.window) == (7, None)
    assert (auxiliary.data.augment.flip, auxiliary.data.augment.recipe) == (False, "pad_crop")
    assert auxiliary.data.train == teacher.data.train
    assert [(loss.name, loss.weight) for loss in auxiliary.kd.losses] == [("kd", 1.0)]
    assert (teacher.kd.mix.mixup, auxiliary.kd.mix) == (0.5, None)


@pytest.mark.parametrize(
    ("shared", "own"),
    [
        ({"checkpoint": {"every_steps": 7}}, {"checkpoint": {"every_steps": None}}),  # the default is 1000
        ({"student": {"kwargs": {"act": "x"}}}, {"student": {"kwargs": {"act": None}}}),
        ({"ema": {"decay": 0.5}}, {"ema": None}),
        ({"teacher": {"name": "resnet10t", "random": True}, "warmup": {}}, {"teacher": None, "warmup": None}),
    ],
)
def test_null_in_a_stage_is_null_at_the_top_level(tree, shared, own):
    """Compared with a plain config that has the stage's keys itself."""
    for section in ("teacher", "warmup", "kd"):
        tree.pop(section)
    tree["kd"] = {"losses": [{"name": "ce"}]}
    (_, plain), *_ = load(merged(merged(tree, shared), own))
    (_, stage), *_ = load({**merged(tree, shared), "stages": [{"name": "one", **own}]})
    assert stage.run_dir == f"{plain.run_dir}/one"
    assert stage.model_copy(update={"run_dir": plain.run_dir}) == plain
    assert stage.checkpoint.every_steps in (None, 1000)


def merged(tree, changes):
    """`tree` with each value of `changes`, at any depth, in place of its own."""
    both = {**tree, **changes}
    return both | {
        key: merged(tree[key], value)
        for key, value in changes.items()
        if isinstance(value, dict) and isinstance(tree.get(key), dict)
    }


def test_null_in_a_stage_for_a_key_that_takes_none_is_an_error(chain):
    chain["stages"][1]["optimizer"] = {"weight_decay": None}
    with pytest.raises(UserError, match=r"stage auxiliary: optimizer\.weight_decay: Input should be"):
        load(chain)


def test_an_override_may_add_the_list_of_runs(tree):
    students = "students=[{name: a}, {name: b, optimizer: {lr: 0.5}}]"
    added = load(tree, students, "students.b.seed=0", "student_groups=disjoint")
    assert [(name, one.optimizer.lr) for name, one in added] == [("a", 1e-3), ("b", 0.5)]
    assert added.groups == "disjoint"
    stages = load(tree, "stages=[{name: a}, {name: b}]", "stages.b.seed=4")
    assert [(name, one.seed) for name, one in stages] == [("a", 0), ("b", 4)]
    with pytest.raises(UserError, match="student_groups is for several students: add the list students"):
        load(tree, "student_groups=disjoint")
    with pytest.raises(UserError, match="students and stages exclude each other: keep one"):
        load(tree, students, "stages=[{name: a}]")


def test_a_teacher_takes_over_the_students_section(chain):
    student = {
        "name": "cnn32_auxiliary",
        "pretrained": True,
        "kwargs": {"a": 1},
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
    }
    chain["stages"][0]["student"] = student
    chain["stages"][2]["teacher"] = {"stage": "teacher", "std": [0.5] * 3}
    auxiliary, student = (settings.teacher for _, settings in load(chain)[1:])
    assert (auxiliary.name, auxiliary.pretrained, auxiliary.kwargs) == ("cnn32_auxiliary", False, {"a": 1})
    assert auxiliary.checkpoint == student.checkpoint == f"{chain['run_dir']}/teacher/student.safetensors"
    assert (auxiliary.mean, auxiliary.std) == ((0.1,) * 3, (0.2,) * 3)
    assert (student.mean, student.std) == ((0.1,) * 3, (0.5,) * 3)


def test_a_reference_replaces_a_shared_teacher(chain):
    chain["teacher"] = {
        "name": "resnet10t",
        "random": True,
        "kwargs": {"a": 1},
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
    }
    teacher, auxiliary, _ = (settings.teacher for _, settings in load(chain))
    assert teacher.name == "resnet10t"
    assert (auxiliary.name, auxiliary.kwargs, auxiliary.mean) == ("cnn32_auxiliary", {}, None)


def test_heads_of_an_earlier_stage(chain):
    heads = {"name": "heads", "stage": "heads", "teacher": {"stage": "teacher"}}
    chain["stages"].insert(1, heads)
    chain["stages"][3]["teacher"] = {"stage": "teacher", "heads": {"stage": "heads"}}
    stages = dict(load(chain))
    assert (stages["heads"].stage, stages["student"].stage) == ("heads", "distill")
    assert stages["heads"].teacher.checkpoint == f"{chain['run_dir']}/teacher/student.safetensors"
    assert stages["student"].teacher.heads == f"{chain['run_dir']}/heads/heads.safetensors"
    assert stages["student"].teacher.checkpoint == f"{chain['run_dir']}/teacher/student.safetensors"
    chain["stages"][3]["teacher"]["heads"] = "other.safetensors"
    assert dict(load(chain))["student"].teacher.heads == "other.safetensors"
    for section, message in (
        ({"stage": "heads"}, "stage student: teacher: stage heads trains heads, not a student"),
        (
            {"stage": "teacher", "heads": {"stage": "auxiliary"}},
            "teacher.heads: stage auxiliary trains a student",
        ),
        (
            {"stage": "teacher", "heads": {"stage": "student"}},
            r"teacher.heads: .*student.* does not name an earlier stage",
        ),
    ):
        chain["stages"][3]["teacher"] = section
        with pytest.raises(UserError, match=message):
            load(chain)


def test_overrides_reach_what_is_shared_and_single_stages(chain):
    overrides = [
        "data.workers=0",
        "stages.0.duration=1 step",
        "stages.student.optimizer.lr=0.5",
        "run_dir=elsewhere",
    ]
    teacher, auxiliary, student = (settings for _, settings in load(chain, *overrides))
    assert [s.data.workers for s in (teacher, auxiliary, student)] == [0, 0, 0]
    assert [s.duration for s in (teacher, auxiliary, student)] == ["1 step", "6 steps", "7 steps"]
    assert [s.optimizer.lr for s in (teacher, auxiliary, student)] == [1e-3, 1e-3, 0.5]
    assert [s.run_dir for s in (teacher, auxiliary, student)] == [
        "elsewhere/teacher",
        "elsewhere/auxiliary",
        "elsewhere/student",
    ]
    assert student.teacher.checkpoint == "elsewhere/auxiliary/student.safetensors"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.1.name=teacher"], "stages.1.name: teacher is already in use"),
        (["stages.1.name=a/b"], "stages.1.name: 'a/b' cannot name a directory"),
        (["stages.1.name=.."], "stages.1.name: '..' cannot name a directory"),
        (["stages.1.name=12"], "stages.1.name: 12 cannot name a directory"),
        (["stages.1.name=null"], "stages.1.name: None cannot name a directory"),
        (["stages=[]"], "stages: expected a list of mappings"),
        (["stages={teacher: 3}"], "stages: expected a list of mappings"),
        (["stages=[teacher]"], "stages: expected a list of mappings"),
        (["stages.2.run_dir=x"], "stage student: run_dir is always the file.s run_dir/student"),
        (["stages.0.teacher.stage=teacher"], r"stage teacher: teacher: .* \(this is the first stage\)"),
        (["stages.1.teacher.stage=student"], r"auxiliary: teacher: .*\(earlier stages: teacher\)"),
        (["stages.auxiliary.teacher.stage=auxiliary"], "teacher: .*auxiliary.* does not name an earlier"),
        (["stages.2.teacher.stage=[1]"], "stage student: teacher: .* does not name an earlier stage"),
        (["stages.2.teacher.heads={stage: teacher, x: 1}"], "heads: .* does not name an earlier stage"),
        (["stages.2.optimizer.lr=fast"], "stage student: optimizer.lr: "),
        (["stages.nowhere.seed=1"], "stages.nowhere.seed does not lead to a key"),
        (["optimiser.lr=1"], "stage teacher: unknown key 'optimiser'; the nearest valid key is 'optimizer'"),
        (["run_dir=''"], "stage teacher: run_dir: "),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_names_the_file_and_the_stage(chain, overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load(chain, *overrides)
    assert "\n" not in str(error.value)
    assert "run.yaml" in str(error.value) or "override" in str(error.value)


def test_other_commands_want_a_stage(chain, capsys):
    load(chain)
    with pytest.raises(SystemExit) as exit_:
        main(["eval", str(Path(chain["run_dir"]).with_suffix(".yaml")), "student.safetensors"])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err
    assert "run.yaml has several stages: give the config.yaml in the run directory of one" in printed
    assert printed.count("\n") == 1
