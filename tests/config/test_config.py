"""Configs: a mistake is one line with file, key and remedy; equal runs have equal fingerprints."""

import copy
import re

import pytest
import yaml

from indistill import config
from indistill.commands import schema
from indistill.config import UserError, runs


@pytest.fixture
def file(tree, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def refusal(path, overrides=()):
    """The message of the UserError that loading raises: one line that begins with the file."""
    with pytest.raises(UserError) as caught:
        config.load(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "key", "nearest"),
    [
        ("optimiser.lr=0.1", "unknown key 'optimiser'", "optimizer"),
        ("sede=3", "unknown key 'sede'", "seed"),
        ("student.nme=resnet18", "student: unknown key 'nme'", "name"),
        ("data.augment.flipp=true", "data.augment: unknown key 'flipp'", "flip"),
        ("warmup.prune.mod=slice", "warmup.prune: unknown key 'mod'", "mode"),
        ("kd.losses.1.temprature=3", "kd.losses.1: unknown key 'temprature'", "temperature"),
        ("kd.losses.0.label_smothing=0.1", "kd.losses.0: unknown key 'label_smothing'", "label_smoothing"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(file, override, key, nearest):
    message = refusal(file, [override])
    assert message.startswith(f"{file} {override}: {key};")
    assert message.endswith(f"nearest valid key is {nearest!r}")


def test_an_unknown_key_of_the_file_itself(tree, file):
    tree["data"]["global_bach"] = 64
    file.write_text(yaml.safe_dump(tree))
    assert (
        refusal(file) == f"{file}: data: unknown key 'global_bach'; the nearest valid key is 'global_batch'"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.global_batch=many", "data.global_batch: Input should be a valid integer"),
        ("data.global_batch=0", "data.global_batch: Input should be greater than 0"),
        ("data.num_classes=2.5", "data.num_classes: Input should be a valid integer"),
        ("data.train=[3]", "data.train.0: Input should be a valid string"),
        ("run_dir=''", "run_dir: String should have at least 1 character"),
        ("data.workers=true", "data.workers: Input should be a valid number, not true"),
        ("optimizer.lr=yes", "optimizer.lr: Input should be a valid number, not true"),
        ("warmup.lr=[1, false]", "warmup.lr: Input should be a valid number, not false"),
        ("data.window=1" + 90 * "0", "data.window: Input should be within ±9,007,199,254,740,992"),
        ("data.window=1.0e+30", "data.window: Input should be within ±9,007,199,254,740,992"),
        ("optimizer.lr=1.0e+400", "optimizer.lr: Input should be a finite number"),
        ("optimizer.lr=1e400", "optimizer.lr: Input should be a finite number"),
        ("optimizer.kwargs.eps=.nan", "optimizer.kwargs: Input should have finite numbers only"),
        ("student.kwargs={a: [1, {b: -.inf}]}", "student.kwargs: Input should have finite numbers only"),
        ("data.workers=257", "data.workers: Input should be less than or equal to 256"),
        ("data.augment.scale=[0.5]", "data.augment.scale.1: Field required"),
        ("data.augment.scale=[0.9, 0.1]", "data.augment: scale and ratio are ranges"),
        ("data.augment.ratio=[2, 1]", "data.augment: scale and ratio are ranges"),
        ("student=resnet18", "student: Input should be a valid dictionary"),
        ("student.mean=[0.5, 0.5, 0.5]", "student: mean and std belong together"),
        ("optimizer.lr=-1", "optimizer.lr: Input should be greater than 0"),
        ("optimizer.lr=.inf", "optimizer.lr: Input should be a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr: Input should be a finite number"),
        ("seed=4294967296", "seed: Input should be less than 4294967296"),
        (
            "warmup.pairs=all",
            "warmup.pairs: Input should be 'auto', or a valid list; the nearest valid value is 'auto'",
        ),
        ("warmup.pairs=3", "warmup.pairs: Input should be 'auto', or a valid list"),
        ("warmup.lr=fast", "warmup.lr: Input should be a valid number, or a valid list"),
        ("data.eval_crop=atuo", "data.eval_crop: Input should be a valid number, or 'auto'; the nearest"),
        ("data.eval_crop=2", "data.eval_crop: Input should be less than or equal to 1, or 'auto'"),
        (
            "engine.name=deepsped",
            "engine: Input should have one of these names: 'ddp', 'deepspeed'; the nearest valid value is "
            "'deepspeed'",
        ),
        ("engine=ddp", "engine: Input should be a mapping with the key 'name'"),
        ("engine.stage=1", "engine: Input should be a mapping with the key 'name'"),
        (
            "targets=cahced",
            "targets: Input should be 'live', 'cached' or 'auto'; the nearest valid value is 'ca",
        ),
        ("warmup.pairs=[[0, 0], [1]]", "warmup.pairs.1.1: Field required"),
        ("warmup.lr=[1, -2]", "warmup.lr.1: Input should be greater than 0"),
        ("kd.losses=[]", "kd.losses: is empty: name at least one loss"),
        ("kd.losses.1.temperature=hot", "kd.losses.1.temperature: Input should be a valid number"),
        ("kd.losses.1.name=dk", "kd.losses.1: unknown loss 'dk'; the nearest are dkd, kd"),
        ("mixed_precision=fp8", "mixed_precision: Input should be 'no', 'bf16' or 'fp16'"),
    ],
)
def test_an_ill_typed_value_is_named(file, override, message):
    assert f": {message}" in refusal(file, [override])


def test_a_list_of_many_mistakes_is_answered_at_once(tree, file):
    tree["data"]["train"] = [1] * 200_000
    with pytest.raises(UserError, match=r"data\.train\.0: Input should be a valid string"):
        config.parse(tree, "my.yaml")


def test_a_required_key_that_is_missing_is_named(tree, file):
    del tree["data"]["train"]
    file.write_text(yaml.safe_dump(tree))
    assert refusal(file) == f"{file}: data.train: Field required"


@pytest.mark.parametrize(
    "key",
    [
        "duration",
        "warmup.durations.1",
        "evaluate.every",
        "schedule.warmup",
        "schedule.decay_every",
        "schedule.decay_at.0",
        "kd.schedule.warmup",
    ],
)
@pytest.mark.parametrize("value", ["3 weeks", "-1", "true"])
def test_durations_are_checked_on_loading(tree, file, key, value):
    tree["schedule"] = {"decay_at": [1]}
    file.write_text(yaml.safe_dump(tree))
    message = refusal(file, [f"{key}={value}"])
    assert f": {key}: duration {yaml.safe_load(value)!r} is not understood" in message


def test_the_run_cannot_last_a_share_of_itself(file):
    assert "duration: duration '50%' is a share of the run" in refusal(file, ["duration=50%"])
    assert config.load(file, ["warmup.durations=[10%, 10%, 10%]"]).warmup.durations == ["10%"] * 3


# --- overrides ----------------------------------------------------------------------------------------------


def test_overrides_reach_everywhere(file):
    loaded = config.load(
        file,
        [
            "optimizer.lr=3e-4",
            "kd.losses.1.temperature=7",
            "warmup.durations.0=2 steps",
            "data.augment={recipe: none}",
            "ema.decay=0.9",  # a section that the file does not have
        ],
    )
    assert loaded.optimizer.lr == 3e-4
    assert loaded.optimizer.name == "adamw"
    assert [loss.name for loss in loaded.kd.losses] == ["ce", "kd"]
    assert loaded.kd.losses[1].temperature == 7
    assert loaded.warmup.durations == ["2 steps", "4 steps", "5 steps"]
    assert (loaded.data.augment.recipe, loaded.data.augment.padding) == ("none", 4)
    assert (loaded.ema.decay, loaded.ema.warmup) == (0.9, True)


def test_a_later_override_wins(file):
    assert config.load(file, ["seed=1", "seed=2"]).seed == 2


def test_null_removes_the_teacher(file):
    alone = config.load(file, ["teacher=null", "warmup=null", "kd.losses=[{name: ce}]"])
    assert alone.teacher is None
    assert alone.warmup is None


@pytest.mark.parametrize(
    "text",
    ["runs/exp #2", "007", "null", "yes", "no", "1e3", "2024-01-01", "a: b", "*x", "&a x", "@x", "[x", "{a}",
     "!x y", " x ", "'", "'a' and 'b'", "%d", "a#b", "- a"],
)  # fmt: skip
def test_an_override_of_a_text_is_literal(tree, file, text):
    tree["data"]["train"] = ["a", "b"]
    tree["student"]["name"] = "x"
    file.write_text(yaml.safe_dump(tree))
    names = ["run_dir", "data.cache_dir", "data.train.1", "data.eval", "student.checkpoint", "student.name"]
    loaded = config.load(file, [f"{name}={text}" for name in names])
    values = config.flatten(loaded, without=())
    assert values["run_dir"] == values["student.name"] == loaded.data.train[1] == text
    optional = None if text == "null" else text
    assert values["data.cache_dir"] == values["student.checkpoint"] == optional
    assert values["data.eval"] == (["a"] if text == "- a" else optional)


def test_an_override_of_a_text_may_be_quoted_or_a_list_as_in_yaml(file):
    assert config.load(file, ["data.root=''"]).data.root == ""
    overrides = ["run_dir='a b'", 'data.root="x\\ty"', "data.train=[a, b]", "data.eval={a,b}-[cd].tar"]
    loaded = config.load(file, overrides)
    assert (loaded.run_dir, loaded.data.root) == ("a b", "x\ty")
    assert (loaded.data.train, loaded.data.eval) == (["a", "b"], "{a,b}-[cd].tar")


def test_a_path_may_begin_with_the_home_directory(tree, file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    tree["data"] |= {
        "eval": {"val": {"shards": "a", "label_map": "~/map"}},
        "label": {"key": "json", "field": "class", "map": "~/map"},
    }
    tree["student"]["name"] = "local-dir:~/model"
    tree["engine"] = {"name": "deepspeed", "config_file": "~/zero.json"}
    tree["teacher"] |= {"random": False, "checkpoint": "~/t.pt", "heads": "~/h"}
    file.write_text(yaml.safe_dump(tree))
    folders = ["run_dir", "data.root", "data.cache_dir", "targets.dir", "mirror", "student.checkpoint"]
    loaded = config.load(file, [f"{key}=~/{key}" for key in folders])
    values = config.flatten(loaded, without=())
    assert {key: values[key] for key in folders} == {key: f"/home/ann/{key}" for key in folders}
    assert (loaded.teacher.checkpoint, loaded.teacher.heads) == ("/home/ann/t.pt", "/home/ann/h")
    assert loaded.student.name == "local-dir:/home/ann/model"
    assert loaded.data.eval["val"].label_map == loaded.data.label.map == "/home/ann/map"
    assert loaded.engine.config_file == "/home/ann/zero.json"
    remote = config.load(file, ["run_dir=a/~/b", "data.root=s3://~/b", "targets.dir='~'"])
    assert (remote.run_dir, remote.data.root, remote.targets.dir) == ("a/~/b", "s3://~/b", "/home/ann")
    (_, stage), *_ = runs.load(file, ["run_dir=~/x", "stages=[{name: one}]"])
    assert stage.run_dir == "/home/ann/x/one"


def test_every_text_of_a_config_that_names_a_path_expands_the_home_directory():
    """What the comment of a key calls a file, a folder or a path is one."""
    comments = schema.meanings(schema.sources())
    named, plain = set(), set()
    for name, section in schema.models().items():
        for key, field in getattr(section, "model_fields", {}).items():
            about = schema.meaning(name, key, comments)
            validators = repr(field.annotation) + repr(field.metadata)
            if re.match(r"(File|Folder|URL|DeepSpeed JSON)\b", about):
                named.add(key)
                if not re.search("path_or_url|expanduser", validators):
                    plain.add((name, key))
    assert {"run_dir", "mirror", "root", "cache_dir", "dir", "checkpoint", "heads", "config_file"} <= named
    assert plain == set()


def test_an_override_of_a_text_in_a_chain_is_literal(tree, file):
    stages = [{"name": "one"}, {"name": "two"}]
    file.write_text(yaml.safe_dump({**tree, "stages": stages}))
    (_, one), (_, two) = runs.load(
        file, ["run_dir=a #1", "stages.two.data.train=b #2", "stages.0.data.root=007"]
    )
    assert (one.run_dir, one.data.root, two.data.train) == ("a #1/one", "007", "b #2")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key.sub=value"),
        ("=3", "expected key.sub=value"),
        ("seed=[1", "the value is not valid YAML"),
        ("kd.losses.first.weight=1", "kd.losses.first.weight does not lead to a key of the config"),
        ("kd.losses.2.weight=1", "kd.losses.2.weight does not lead to a key of the config"),
        ("trackers.0=wandb", "trackers.0 does not lead to a key of the config"),  # there is no list
        ("run_dir.sub=1", "run_dir.sub does not lead to a key of the config"),
        ("run_dir=", "has no value: write run_dir=null, or run_dir='' for an empty text"),
        ("data.root=", "has no value: write data.root=null, or data.root='' for an empty text"),
        ("ema.decay= ", "has no value: write ema.decay=null, or ema.decay='' for an empty text"),
        ("stages.0.seed=1", "the config has no list of stages"),
        ("students.small.seed=1", "the config has no list of students"),
    ],
)
def test_bad_overrides(file, override, message):
    with pytest.raises(UserError) as caught:
        runs.load(file, [override])  # as the commands do
    assert str(caught.value) == f"override {override!r}: {message}"


# --- what the file may hold ---------------------------------------------------------------------------------


def test_yaml_reads_no_as_false_and_it_works_all_the_same(file):
    file.write_text(file.read_text() + "\nmixed_precision: no\n")
    assert yaml.safe_load(file.read_text())["mixed_precision"] is False
    assert config.load(file).mixed_precision == "no"
    assert config.load(file, ["mixed_precision=no"]).mixed_precision == "no"


def test_a_config_runs_no_code(file, tmp_path):
    proof = tmp_path / "proof"
    file.write_text(f"run_dir: !!python/object/apply:os.system ['touch {proof}']\n")
    assert "not valid YAML" in refusal(file)
    file.write_text("seed: 0")
    assert "not valid YAML" in refusal(file, [f"seed=!!python/object/apply:os.system ['touch {proof}']"])
    assert not proof.exists()


def test_files_that_are_no_configs(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert refusal(missing) == f"{missing}: No such file or directory"
    assert refusal(tmp_path) == f"{tmp_path}: Is a directory"
    malformed = tmp_path / "malformed.yaml"
    malformed.write_text("data: {train: [a, b\nkd: }")
    assert refusal(malformed).startswith(f"{malformed}: not valid YAML: ")
    malformed.write_bytes(b"run_dir: \xff\xfe")
    assert refusal(malformed) == f"{malformed}: Not text in UTF-8 (byte 9)"
    for text in ("", "- a\n- b\n", "just text"):
        malformed.write_text(text)
        assert refusal(malformed) == f"{malformed}: expected a mapping of keys at the top level"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null", "warmup=null"], "kd.losses: kd needs a teacher"),
        (["teacher=null", "warmup=null", "kd.losses.1={name: pkt}"], "kd.losses: pkt needs a teacher"),
        (["teacher=null", "kd.losses=[{name: ce}]"], "warmup needs a teacher"),
        (["data.eval=null", "evaluate.every=1"], "evaluate.every needs shards to evaluate on: set data.eval"),
        (
            ["data.eval=null", "evaluate.retrieval=true"],
            "evaluate.retrieval needs query shards: set data.eval",
        ),
        (
            ["student.pretrained=true", "student.checkpoint=a.pt"],
            "student: pretrained and checkpoint exclude",
        ),
        (["student=null"], "student: missing: add the section student"),
        (["teacher.num_classes=0"], "kd.losses: kd reads the teacher's logits, but this teacher has no"),
        (["student.num_classes=0"], "kd.losses: ce reads the student's logits, but this student has no"),
        (["kd.losses=[{name: dih}]"], "kd.losses: dih needs teacher.heads"),
        (
            ["data.repeats=3", "data.augment.views=4"],
            "data: augment.views (4) must be a multiple of repeats (3)",
        ),
        (
            ["data.repeats=3", "data.access=stream", "data.epoch_samples=9", "data.in_memory=false"],
            "data: repeats does not work with access: stream: remove one of them",
        ),
        (
            ["data.access=stream", "data.epoch_samples=1", "data.in_memory=false"],
            "data: epoch_samples (1) is below global_batch",
        ),
        (["kd.losses=[{name: dkd}]", "kd.mix={mixup: 0.2}"], "kd.losses: dkd reads the class of each sample"),
        (
            ["stage=heads", "warmup=null", "kd.losses=[{name: ce}]"],
            "stage: heads trains classifiers on the teacher",
        ),
        (
            ["stage=heads", "student=null", "warmup=null", "kd.losses=[{name: ce}]", "teacher.shard=true"],
            "stage: heads needs the whole teacher on every process: remove teacher.shard",
        ),
    ],
)
def test_what_does_not_go_together(file, overrides, message):
    assert message in refusal(file, overrides)


def test_a_config_cannot_be_changed_after_loading(settings):
    with pytest.raises(ValueError, match="frozen"):
        settings.seed = 3


# --- round trip and identity --------------------------------------------------------------------------------


def test_dump_is_read_back_equal(tree, file):
    every_section = {
        "ema": {"decay": 0.99},
        "clip_grad_norm": 1.0,
        "schedule": {"name": "multistep", "decay_at": ["3 epochs", 5]},
        "evaluate": {"every": "10%", "retrieval": True},
    }
    tree |= every_section
    tree["kd"]["mix"] = {"mixup": 0.2}
    tree["kd"]["losses"].append({"name": "pkt", "weight": 2})
    tree["student"] |= {"kwargs": {"widths": [1, 2], "act": None}, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    tree["warmup"] |= {"pairs": [[0, 0], [1, 1], [2, 2]], "lr": [0.1, 0.2, 0.3]}
    parsed = config.parse(tree, "test")
    text = config.dump(parsed)
    assert config.parse(yaml.safe_load(text), "dump") == parsed
    assert config.dump(config.parse(yaml.safe_load(text), "dump")) == text
    assert config.fingerprint(config.parse(yaml.safe_load(text), "dump")) == config.fingerprint(parsed)


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=elsewhere",
        "checkpoint.every_steps=7",
        "trackers=[wandb, tensorboard]",
        "data.root=/mnt",
        "data.cache_dir=/tmp/cache",
        "data.workers=9",
        "evaluate.batch=8",
        "teacher.shard=true",
    ],
)
def test_operational_keys_do_not_change_the_run(file, settings, override):
    other = config.load(file, [override])
    assert other != settings
    assert config.fingerprint(other) == config.fingerprint(settings)
    assert config.difference(settings, other) is None


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=1", "seed: 0 -> 1"),
        ("data.streams=16", "data.streams: 8 -> 16"),
        ("data.repeats=2", "data.repeats: 1 -> 2"),
        ("data.eval_crop=0.9", "data.eval_crop: 1.0 -> 0.9"),
        ("data.eval_crop=auto", "data.eval_crop: 1.0 -> auto"),
        ("data.interpolation=random", "data.interpolation: bilinear -> random"),
        ("data.eval_interpolation=bicubic", "data.eval_interpolation: auto -> bicubic"),
        ("warmup.prune.mode=paper_bn", "warmup.prune.mode: slice -> paper_bn"),
        ("ema.decay=0.9", "ema.decay: None -> 0.9"),
        ("clip_grad_norm=1", "clip_grad_norm: None -> 1.0"),
        ("student.kwargs={act: x}", "student.kwargs: {} -> None"),
        ("teacher={name: cnn32_auxiliary, checkpoint: a.pt}", "teacher.checkpoint: None -> a.pt"),
    ],
)
def test_everything_else_does(file, settings, override, difference):
    other = config.load(file, [override])
    assert config.fingerprint(other) != config.fingerprint(settings)
    assert config.difference(settings, other) == difference


def test_keys_that_earlier_versions_lacked_are_not_in_the_identity_of_their_runs(settings):
    assert not config.flatten(settings).keys() & {"data.repeats", "warmup.at_most"}


def test_a_run_of_before_the_warmups_limit_is_told_from_one_with_it(file, tree, tmp_path):
    """Its config.yaml lacks the key: the run goes on with `at_most: null`, or where the key has no effect."""
    tree["warmup"] = {"curriculum": "sequential", "alpha": 2}
    saved = yaml.safe_load(config.dump(config.parse(tree, "test")))
    del saved["warmup"]["at_most"]
    recorded = tmp_path / "config.yaml"
    recorded.write_text(yaml.safe_dump(saved))
    earlier = config.load_recorded(recorded)
    file.write_text(yaml.safe_dump(tree))
    assert config.difference(earlier, config.load(file)) == "warmup.at_most: None -> 20 percent"
    assert config.difference(earlier, config.load(file, ["warmup.at_most=null"])) is None

    saved["warmup"]["durations"] = [1, 1, 1]
    recorded.write_text(yaml.safe_dump(saved))
    durations = config.load(file, ["warmup.durations=[1, 1, 1]"])
    assert config.difference(config.load_recorded(recorded), durations) is None
    assert config.fingerprint(config.load_recorded(recorded)) == config.fingerprint(durations)


def test_other_losses_and_removed_sections_are_differences(file, settings):
    hotter = config.difference(settings, config.load(file, ["kd.losses.1.temperature=2"]))
    key, old, new = re.fullmatch("(.*?): (.*) -> (.*)", hotter).groups()
    assert key == "kd.losses"
    assert [loss.get("temperature") for loss in yaml.safe_load(old)] == [None, 4.0]
    assert [loss.get("temperature") for loss in yaml.safe_load(new)] == [None, 2.0]
    without = config.difference(settings, config.load(file, ["warmup=null"]))
    assert re.fullmatch(r"warmup\.\w+: .* -> None", without)


def test_values_that_mean_the_same_are_the_same_run(tree, settings):
    same = copy.deepcopy(tree)
    same["optimizer"] |= {"lr": "1e-3", "momentum": 0.9}
    assert config.fingerprint(config.parse(same, "test")) == config.fingerprint(settings)


# --- a teacher that knows nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["{name: resnet18}", "{name: resnet18, pretrained: false}"])
@pytest.mark.parametrize(
    "stage", [[], ["stage=heads", "student=null", "warmup=null", "kd.losses=[{name: ce}]"]]
)
def test_a_teacher_without_weights_is_refused(file, teacher, stage):
    message = refusal(file, [*stage, f"teacher={teacher}"])
    assert message.endswith(
        "teacher: resnet18 has no weights: set pretrained: true or checkpoint: FILE; for a random "
        "teacher, as a control, set random: true and pretrained: false"
    )


@pytest.mark.parametrize("weights", ["pretrained: true", "checkpoint: a.pt"])
def test_a_teacher_is_random_or_has_weights(file, weights):
    message = refusal(file, [f"teacher={{name: resnet18, random: true, {weights}}}"])
    assert message.endswith("teacher: random: true excludes pretrained: true and checkpoint: keep one")
    assert config.load(file, [f"teacher={{name: resnet18, {weights}}}"]).teacher.random is False


def test_an_empty_checkpoint_is_not_taken_for_none(file):
    """As that of a shell variable that is not set: the student would begin with random weights."""
    message = refusal(file, ["student.checkpoint=''"])
    assert message.endswith("student: checkpoint is empty: name a file, or set null for none")


def test_a_control_says_so_and_a_student_needs_not(file):
    control = config.load(file, ["teacher={name: resnet18, pretrained: false, random: true}"])
    assert control.teacher.random
    assert config.parse(yaml.safe_load(config.dump(control)), "saved") == control
    assert config.load(file, ["student={name: resnet18}"]).student.pretrained is False
