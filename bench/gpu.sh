#!/usr/bin/env bash
# Everything that only a GPU can show, in 8 minutes by estimate: builds with nvcc, runs the tests
# marked gpu, looks for bad memory accesses and races in the CUDA sources, measures the GPU
# rows of docs/performance.md.
#
#   bench/gpu.sh                  all of it
#   bench/gpu.sh tests measured   some of: built tests checked measured
#
# PYTHON is the interpreter that has torch (python3), OUT the folder of all logs and of ops.json
# (bench/out/gpu). Needs no network: pip builds with the setuptools, ninja and pybind11 there are.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
out=${OUT:-bench/out/gpu}

"$python" - <<'END' || exit
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"bench/gpu.sh: {sys.executable} has no torch ({error}); set PYTHON")
if not torch.cuda.is_available():
    sys.exit(f"bench/gpu.sh: torch {torch.__version__} sees no CUDA GPU, so nothing was run")
END
mkdir -p "$out" || exit
if [ -z "${CUDA_HOME:-}" ]; then # where nvcc is a wrapper, torch's guess is not its toolkit
  toolkit=$(nvcc --dryrun -c none.cu 2>&1 | sed -n 's/^#\$ TOP=//p')
  [ -z "$toolkit" ] || export CUDA_HOME=$toolkit
fi

built() {
  "$python" -m pip install --no-build-isolation --no-deps -e . && "$python" -m rlhf_fast.info
}

tests() {
  "$python" -m pytest -m gpu -q --durations=5 tests/ops/test_gpu.py
}

checked() { # one row of one tile and of several, with and without 16-byte loads
  local sanitizer tool
  sanitizer=$(PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin command -v compute-sanitizer) ||
    { echo "no compute-sanitizer: the CUDA sources are not checked"; return 1; }
  for tool in memcheck racecheck; do
    timeout 120 "$sanitizer" --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -m gpu -q tests/ops/test_gpu.py -k "gae_cuda and (37 or 1000)" || return
  done
}

measured() { # the most important rows first; an interrupt keeps what it has
  timeout --foreground --preserve-status --signal INT --kill-after 60 240 \
    "$python" bench/run.py --quick --device cuda --out "$out" --keep ops
}

steps=("$@")
[ $# -gt 0 ] || steps=(built tests checked measured)
failed=""
for step in "${steps[@]}"; do
  case $step in
    built | tests | checked | measured) ;;
    *) echo "bench/gpu.sh: no step $step; there are built tests checked measured"; exit 2 ;;
  esac
  echo "== $step"
  "$step" 2>&1 | tee "$out/$step.log" || failed+=" $step"
done
echo "== in $out: $(ls "$out" | tr '\n' ' ')"
[ -z "$failed" ] || { echo "bench/gpu.sh: FAILED:$failed"; exit 1; }
