"""Values for `indistill init` that are more than names, and files that are there already."""

from pathlib import Path

from hostile import Case, Inputs

MINE = "#SBATCH --nodes=9\n"


def _taken(inputs: Inputs) -> list[str]:
    script = _script(inputs)
    script.parent.mkdir(parents=True)
    script.write_text(MINE)
    return ["init", "imagenet_r34_r18", str(inputs.folder / "new"), "--slurm"]


def _script(inputs: Inputs) -> Path:
    return inputs.folder / "new" / "launch" / "slurm" / "train.sbatch"


def _nothing_written(inputs: Inputs) -> None:
    assert not (inputs.folder / "new").exists()


def _unchanged(inputs: Inputs) -> None:
    assert _script(inputs).read_text() == MINE
    assert not (inputs.folder / "new" / "configs").exists()


def _named(option: str, value: str) -> Case:
    def arguments(inputs: Inputs) -> list[str]:
        return ["init", "imagenet_r34_r18", str(inputs.folder / "new"), "--slurm", f"{option}={value}"]

    error = f"{option} .*: is not the (name of a SLURM|path or URL)"
    return Case(f"init {option} {value!r}", arguments, error=error, after=_nothing_written)


CASES = [
    _named("--partition", "gpu$(touch injected)"),
    _named("--account", "lab\n#SBATCH --uid=0"),
    _named("--data", "/data/\x1b[2J"),
    Case("init over a file", _taken, error=r"train\.sbatch: exists and is not changed", after=_unchanged),
]
