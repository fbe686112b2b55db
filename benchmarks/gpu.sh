#!/usr/bin/env bash
# All that is worth doing on one GPU, in one call of under 8 minutes: correctness first, then figures.
#
#   bash benchmarks/gpu.sh                # from the repository's root, with torch >= 2.6, timm and accelerate there
#
# Wheels that the machine lacks are taken from $WHEELS (.whl), if there are any; on a machine with a network, before:
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
#       --platform manylinux_2_28_x86_64 -d .whl webdataset braceexpand simplejpeg pydantic pydantic-core \
#       annotated-types typing-inspection hypothesis sortedcontainers pytest pluggy iniconfig torchdistill
# Results: benchmarks/results/step_gpu*.md and .json, gpu.log; copies in $OUT, if it is set. Exit code 1 if a test
# failed, whatever became of the figures.
set -uo pipefail
cd "$(dirname "$0")/.."
results=benchmarks/results
mkdir -p "$results"
export OMP_NUM_THREADS=4 PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
site=$(mktemp -d)
if compgen -G "${WHEELS:-.whl}/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "${WHEELS:-.whl}"/*.whl || exit 1
    export PYTHONPATH=$PYTHONPATH:$site
fi
python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "gpu.sh: no GPU here"; exit 1; }

failed=0
part() { # seconds, then a command
    echo "--- $(date +%T) ${*:2}"
    timeout --kill-after=10 "$@"
}
{
    part 130 python3 -m pytest -x -q tests/cluster/test_gpu.py tests/targets/test_live.py tests/targets/test_stored.py || failed=1
    peers=()
    [ -d "$site/torchdistill" ] && peers=(--peers "$site")
    # What is there when the time is up has been written.
    part 235 python3 benchmarks/step.py --rounds 5 --out step_gpu "${peers[@]}" || echo "gpu.sh: step.py did not end"
    part 100 python3 benchmarks/step.py --pairs r34_r18 --no-warmup --rounds 3 --compile --out step_gpu_compiled ||
        echo "gpu.sh: step.py --compile did not end"
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
} > >(tee "$results/gpu.log") 2>&1
wait $! # for the last lines of the log
[ -n "${OUT:-}" ] && cp "$results"/step_gpu* "$results/gpu.log" "$OUT"/
exit "$failed"
