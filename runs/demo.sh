#!/usr/bin/env bash
# From nothing to a tiny model that is fine-tuned, taught preferences, scored, and ready to chat:
#   runs/demo.sh            under five minutes on 2 CPU cores
set -euo pipefail
cd "$(dirname "$0")/.."

torchrun sft.py
torchrun dpo.py
rm -rf runs/demo/scores  # every run of the demo starts afresh
for model in base sft dpo; do
  python evaluate.py --model runs/demo/$model --out runs/demo/scores/$model.json
done
for question in "What is the largest number among 3 9 4?" "Sort pie ant gold."; do
  echo "> $question"
  python generate.py --prompt "$question"
done
[ ! -t 0 ] || python generate.py # at a terminal: chat
