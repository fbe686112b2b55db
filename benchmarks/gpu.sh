#!/usr/bin/env bash
# All that is worth doing on one GPU, in one call of under 8 minutes: correctness first, then figures.
#
#   bash benchmarks/gpu.sh                # from the repository's root, with torch >= 2.10, timm and accelerate there
#   bash benchmarks/gpu.sh --dry          # the same on the CPU, without time limits: tests are only collected, steps have
#                                         # one image
#
# Wheels that the machine lacks are taken from $WHEELS (.whl), if there are any; on a machine with a network, before:
#   python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
#       --platform manylinux_2_28_x86_64 -d .whl webdataset braceexpand simplejpeg pydantic pydantic-core \
#       annotated-types typing-inspection hypothesis sortedcontainers pytest pluggy iniconfig torchdistill
# Results: benchmarks/results/step_gpu*.md and .json, gpu.log; copies in $OUT, if it is set. Exit code 1 if a test
# failed, whatever became of the figures; with --dry also if a benchmark did not end.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$PWD/benchmarks/results
tests=()
steps=()
compiled=(--compile)
if [ "${1:-}" = --dry ]; then
    results=$(mktemp -d)
    tests=(--collect-only)
    steps=(--pairs r34_r18 --precisions fp32 --batch 1 --rounds 1 --launches 1 --no-warmup)
    compiled=() # which takes minutes
    export CUDA_VISIBLE_DEVICES=
fi
mkdir -p "$results"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
site=$(mktemp -d)
if compgen -G "${WHEELS:-.whl}/*.whl" >/dev/null; then
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "${WHEELS:-.whl}"/*.whl || exit 1
    export PYTHONPATH=$PYTHONPATH:$site
fi
if [ -z "${tests[*]}" ] && ! python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: no GPU here"
    exit 1
fi

failed=0
incomplete() { # what did not end; what is there when the time is up has been written
    echo "gpu.sh: $1 did not end"
    [ -z "${tests[*]}" ] || failed=1
}
part() { # seconds, then a command
    echo "--- $(date +%T) ${*:2}"
    if [ -z "${tests[*]}" ]; then timeout --kill-after=10 "$@"; else "${@:2}"; fi # a CPU may be slow
}
{
    part 130 python3 -m pytest -x -q tests/cluster/test_gpu.py tests/targets/test_live.py tests/targets/test_stored.py \
        "${tests[@]}" || failed=1
    peers=()
    [ -d "$site/torchdistill" ] && peers=(--peers "$site")
    part 235 python3 benchmarks/step.py --rounds 5 --out "$results/step_gpu" "${peers[@]}" "${steps[@]}" ||
        incomplete step.py
    part 100 python3 benchmarks/step.py --pairs r34_r18 --no-warmup --rounds 3 "${compiled[@]}" \
        --out "$results/step_gpu_compiled" "${steps[@]}" || incomplete "step.py --compile"
    [ -n "${tests[*]}" ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
} > >(tee "$results/gpu.log") 2>&1
wait $! # for the last lines of the log
[ -n "${OUT:-}" ] && cp "$results"/step_gpu* "$results/gpu.log" "$OUT"/
exit "$failed"
