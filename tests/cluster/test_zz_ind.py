import sys

sys.path.insert(0, "/work/w18d/tests/cluster")
from test_checkpointing_ranks import *


def test_inductor(recipe, tmp_path):
    recipe["student"]["kwargs"] = {}
    recipe["warmup"] = {"durations": ["3 steps"], "pairs": [[1, 1]]}
    recipe["compile"] = True
    plain = recipe | {"run_dir": str(tmp_path / "plain")}
    run_ranks(compiled, None, plain, "inductor")
    run_ranks(compiled, None, recipe | {"grad_checkpointing": True}, "inductor")
    print(losses(plain["run_dir"]))
    print(losses(recipe["run_dir"]))
    a, b = (load_file(Path(t["run_dir"]) / "student.safetensors") for t in (recipe, plain))
    print({k: (v.item(), b[k].item()) for k, v in a.items() if "num_batches" in k})
    print(max((a[k] - b[k]).abs().max().item() for k in a))
    assert 0
