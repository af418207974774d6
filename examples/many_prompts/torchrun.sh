#!/usr/bin/env bash
# One process for each device of this machine; each takes its share of the prompts.
#   examples/many_prompts/torchrun.sh OUT [PROCESSES]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
torchrun --nproc-per-node "${2:-2}" -m pag_fast.cli generate \
  --prompts "$here/prompts.jsonl" --out "$1" --steps 2 --guidance-scale 2
