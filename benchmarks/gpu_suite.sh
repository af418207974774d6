#!/usr/bin/env bash
# Everything that needs a GPU, in one go: kernel tests, pipelines, tuning, benchmarks. Each part has
# a time limit of its own, and a part that fails or runs out of time does not stop the next.
# Logs and JSON go to $OUT. PYTHON is an interpreter that has torch and triton; what else is missing
# (diffusers, transformers, pytest, pytest-benchmark, matplotlib) comes from the folder of wheels
# $WHEELS, if that is set.
# At most 580 seconds in all.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-gpu-results}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT/configs"
export PYTHONPATH=.:tests:kernels/torch-ext
export PAG_FAST_TEST_DEVICE=cuda TRITON_INTERPRET=0

failed=0
part() { # name, seconds, command...
  local name=$1 limit=$2
  shift 2
  echo "== $name (at most $limit s)"
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  local code=$?
  tail -n 5 "$OUT/$name.log"
  echo "$name $code" >>"$OUT/status.txt"
  [ "$code" -eq 0 ] || failed=1
}

: >"$OUT/status.txt"
git rev-parse HEAD >"$OUT/commit.txt" 2>/dev/null || true
if [ -n "${WHEELS:-}" ]; then
  part install 30 "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
fi
part env 20 "$PYTHON" -m pag_fast.cli env
part kernels 150 "$PYTHON" -m pytest -q tests/test_kernel_perturbed_attention.py \
  tests/test_kernel_linear_attention.py tests/test_kernel_qk_norm_rope.py \
  tests/test_kernel_combine_guidance.py tests/test_kernel_noisy_attention.py \
  tests/test_kernel_ops.py
part pipelines 80 "$PYTHON" -m pytest -q tests/test_kernel_pipelines.py
part tune 90 "$PYTHON" -m benchmarks.tune --seconds 80 --out "$OUT/configs"
# what is eager first: compiling takes longer than measuring. A session that stops in time has
# passed, and its results can be compared
part bench 130 "$PYTHON" -m pytest -q benchmarks --compiled no --seconds 100 \
  --rows "$OUT/results.json"
part compiled 80 "$PYTHON" -m pytest -q benchmarks --compiled yes --rounds 5 --seconds 40 \
  -k "test_step and 512" --rows "$OUT/compiled.json"
cat "$OUT/status.txt"
exit "$failed"
