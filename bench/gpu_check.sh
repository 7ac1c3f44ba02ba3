#!/usr/bin/env bash
# Everything that only a GPU can tell: tests, sanitizers, benchmarks.
#
#     bench/gpu_check.sh OUT [WHEELS [STAGE...]]
#
# Needs a GPU, torch for it, and no network: OUT gets logs and summary.json; WHEELS is a folder of other packages
# to compare with, or "". Every stage runs whatever became of the ones before, or only those named, where time is
# short; the exit code is 0 if all passed.
set -uo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 OUT [WHEELS [STAGE...]]" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
wheels=
if [ -n "${2:-}" ]; then
    wheels=$(cd "$2" && pwd) || exit 2
fi
wanted=" ${*:3} "
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "no GPU: $python has no torch that finds one" >&2
    exit 1
fi

# Code for this device alone: everything else takes minutes to compile.
HDC_CUDA_ARCHITECTURES=$("$python" -c '
import torch
major, minor = torch.cuda.get_device_capability()
print(f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else ""))')
export HDC_CUDA_ARCHITECTURES

record=$out/stages.tsv
: >"$record"

# asked NAME: whether to run a stage.
asked() {
    [ "$wanted" = "  " ] || [[ $wanted == *" $1 "* ]]
}

# stage NAME SECONDS COMMAND...: run it, log to OUT/NAME.log, and note "pass", "fail" or "out of time".
stage() {
    local name=$1 limit=$2 began=$SECONDS code state
    shift 2
    echo "== $name"
    timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    case $code in
    0) state=pass ;;
    124 | 137) state="out of time" ;;
    *) state=fail ;;
    esac
    [ "$state" = pass ] || tail -n 15 "$out/$name.log"
    printf '%s\t%s\t%s\n' "$name" "$state" $((SECONDS - began)) >>"$record"
    [ "$state" = pass ]
}

# missing NAME WHAT: note a stage that cannot run.
missing() {
    echo "== $1: $2 is missing"
    printf '%s\tmissing: %s\t0\n' "$1" "$2" >>"$record"
}

# skipped NAME WHY: note a stage that this machine need not have.
skipped() {
    echo "== $1: skipped, $2"
    printf '%s\tskipped: %s\t0\n' "$1" "$2" >>"$record"
}

# Installed into a folder of its own, which works with any Python and leaves it as it is. --no-deps: of what the
# package needs beyond torch, kernels and benchmarks use little.
installed=$(mktemp -d)
trap 'rm -rf "$installed"' EXIT
install=("$python" -m pip install --no-index --no-deps --target "$installed")
sources=$PWD
if stage build 300 "${install[@]}" --no-build-isolation .; then
    export PYTHONPATH=$installed
else
    export PYTHONPATH=$sources # what needs no compiler can still be checked
fi
stage library 60 "$python" -P -c '
import torch
from hdc_kernels.backends import cuda
cuda.library()
assert cuda.runs_on(torch.cuda.get_device_capability())'
if [ -n "$wheels" ]; then
    stage peers 120 "${install[@]}" "$wheels"/*.whl
    export PYTHONPATH=$PYTHONPATH:$installed
fi

# -P: the installed package, not the sources beside it. conftest.py serves the video tests, and needs PyAV.
tests=("$python" -P -m pytest)
"$python" -c 'import av' 2>/dev/null || tests+=(--noconftest)
mapfile -t marked < <(grep -l 'mark\.gpu' tests/test_*.py)
if asked tests-gpu && [ ${#marked[@]} -gt 0 ]; then
    stage tests-gpu 600 "${tests[@]}" -m gpu "${marked[@]}"
fi
asked tests-triton && stage tests-triton 900 "${tests[@]}" tests/test_triton{,_functions,_means,_operators}.py \
    tests/test_{scale,augment}.py

sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer)
for backend in triton cuda; do
    # Triton compiles its kernels here; if this fails, so will what follows.
    asked "paths-$backend" && stage "paths-$backend" 600 "$python" bench/sanitize_gpu.py "$backend"
    for tool in memcheck racecheck synccheck initcheck; do
        asked "$tool-$backend" || continue
        if [ -n "$sanitizer" ]; then
            stage "$tool-$backend" 600 "$sanitizer" --tool "$tool" --error-exitcode 1 \
                "$python" bench/sanitize_gpu.py "$backend"
        else
            missing "$tool-$backend" compute-sanitizer
        fi
    done
done

# How busy tensor cores and MUFU are, in profile-*.log; most machines keep the counters from ordinary users.
profiler=$(PATH=$PATH:/usr/local/cuda/bin command -v ncu)
counters=$("${profiler:-false}" "$python" -c 'import torch; torch.ones(1, device="cuda")' 2>&1 || true)
sections=(--section SpeedOfLight --section ComputeWorkloadAnalysis --section LaunchStats)
for backend in triton cuda; do
    asked "profile-$backend" || continue
    if [ -z "$profiler" ]; then
        skipped "profile-$backend" "no ncu"
    elif grep -q ERR_NVGPUCTRPERM <<<"$counters"; then
        skipped "profile-$backend" "counters not permitted"
    else
        stage "profile-$backend" 600 "$profiler" --profile-from-start off "${sections[@]}" --print-details all \
            "$python" bench/profile_gpu.py "$backend"
    fi
done

compare=("$python" bench/compare.py --device cuda --seconds 1 --limit 10)
asked bench-bf16 && stage bench-bf16 900 "${compare[@]}" --symmetric --out "$out/bench-bf16.json"
asked bench-float32 && stage bench-float32 900 "${compare[@]}" --dtype float32 --sizes 128 2048 8192 32768 \
    --out "$out/bench-float32.json"
asked bench-augment && stage bench-augment 300 "${tests[@]}" bench/bench_augment.py --benchmark-only \
    --benchmark-json "$out/bench-augment.json"
asked bench-scale && stage bench-scale 120 "${tests[@]}" bench/bench_scale.py --benchmark-only \
    --benchmark-json "$out/bench-scale.json"

"$python" - "$record" "$out" <<'EOF'
import json
import sys
from pathlib import Path

record, out = map(Path, sys.argv[1:])
stages = {}
for line in record.read_text().splitlines():
    name, state, seconds = line.split("\t")
    stages[name] = {"state": state, "seconds": int(seconds)}
    print(f"{name:16} {state:32} {seconds:>5} s")
summary = {"stages": stages}
for name in ("bf16", "float32", "augment", "scale"):
    path = out / f"bench-{name}.json"
    summary[f"bench-{name}"] = json.loads(path.read_text()) if path.exists() else None
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
EOF
if cut -f 2 "$record" | grep -qvE '^(pass|skipped: .*)$'; then
    echo "not everything passed: see $out"
    exit 1
fi
echo "all passed: $out/summary.json"
