#!/usr/bin/env bash
# What needs a GPU, in stages of at most eight minutes: check, tune, step, ops, compiled, graphs.
#
#   STAGE    which, "step" or "check tune"; all of them if unset
#   OUT      the folder for a JSON file of each stage and one archive of logs; gpu-results if unset
#   PYTHON   an interpreter that has torch and triton; python3 if unset
#   WHEELS   a folder of wheels of what else is missing, installed beside the interpreter's packages
#   SCRATCH  a folder for those and for caches, kept from run to run; in /tmp if unset
#   COMMIT   of the sources, where there is no .git to ask
#   JOBS     processes that test, or compile while another one measures
#
# PYTHONPATH is kept. Nothing is written into the checkout but $OUT, if that is there.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
OUT=$(realpath -m "${OUT:-$ROOT/gpu-results}")
PYTHON=${PYTHON:-python3}
SCRATCH=$(realpath -m "${SCRATCH:-${TMPDIR:-/tmp}/pag-fast-gpu-suite-$(id -u)}")
mkdir -p "$OUT" "$SCRATCH"
path=$ROOT:$ROOT/tests:$ROOT/kernels/torch-ext
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
    --target "$SCRATCH/site" "$WHEELS"/*.whl
  path=$path:$SCRATCH/site
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SCRATCH/inductor}
export PAG_FAST_TEST_DEVICE=cuda TRITON_INTERPRET=0 PYTHONUNBUFFERED=1
cd "$ROOT"
# shellcheck disable=SC2086 # several stages are several words
exec "$PYTHON" -m benchmarks.gpu_suite --out "$OUT" ${STAGE:-all}
