#!/usr/bin/env bash
# Code Tulu 2: Code Llama fine-tuned on the Tulu V2 mixture.
#
#   runs/code_tulu2.sh 7b|13b|34b CODE_LLAMA_DIR MIXTURE_FILE [torchrun's flags]
#
# Hyper-parameters: Ivison et al. 2023, appendix B; the paper gives no other rate for the 34B.
set -euo pipefail
size=$1 llama=$2 mixture=$3
shift 3
cd "$(dirname "$0")/.."
case $size in
  7b | 13b | 34b) ;;
  *) echo "error: size is $size, expected 7b, 13b or 34b" >&2; exit 2 ;;
esac
torchrun --nproc_per_node gpu "$@" sft.py --model "$llama" --data "$mixture" \
  --out "runs/code-tulu-2-$size" \
  --epochs 2 --batch-size 128 --max-seq-len 8192 --lr 2e-5 --warmup-ratio 0.03 --save-every 250
