"""Ordinary input, to show that the table's checks let it pass, and the smallest mistake."""

from hostile import Case

CASES = [
    Case("ordinary training", lambda inputs: inputs.train()),
    Case("ordinary shards", lambda inputs: ["shards", "verify", str(inputs.data / "train-*.tar")]),
    Case("no such shard", lambda inputs: inputs.train(train="no-*.tar"), error=r"no-\*\.tar"),
]
