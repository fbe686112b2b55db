"""benchmarks/gpu.sh has one chance on a lent GPU: all of it runs on the CPU first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.sh"


@pytest.mark.slow
def test_the_whole_script_runs_dry(tmp_path):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # for python3
    environment = {**os.environ, "PATH": path, "OUT": str(tmp_path), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        ["bash", GPU, "--dry"], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    log = (tmp_path / "gpu.log").read_text()
    assert "test_gpu.py" in log
    assert "did not end" not in log
    for name in ("step_gpu", "step_gpu_compiled"):
        contestants = [
            one["job"]["contestant"] for one in json.loads((tmp_path / f"{name}.json").read_text())
        ]
        assert contestants[:2] == ["by hand", "indistill"]
        assert "| indistill |" in (tmp_path / f"{name}.md").read_text()
