#!/usr/bin/env bash
# Code Tulu 2: Code Llama fine-tuned on the Tulu V2 mixture.
#
#   runs/code_tulu2.sh 7b|13b|34b CODE_LLAMA_DIR MIXTURE [torchrun's flags, e.g. --nnodes 2 …]
#
# CODE_LLAMA_DIR: Code Llama as a Hugging Face folder. MIXTURE: the Tulu V2 mixture (mixture.py's,
# or the released data set). Uses all GPUs of the machine. The result is runs/code-tulu-2-SIZE. Run it
# again after an interruption: it continues.
#
# Hyper-parameters: Ivison et al. 2023, appendix B; the paper gives no other rate for the 34B.
set -euo pipefail
if (($# < 3)); then
  echo "error: found $# arguments, expected 7b|13b|34b CODE_LLAMA_DIR MIXTURE" >&2
  exit 2
fi
size=$1 llama=$(realpath -m "$2") mixture=$(realpath -m "$3")
shift 3
case $size in
  7b | 13b | 34b) ;;
  *) echo "error: size is $size, expected 7b, 13b or 34b" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
torchrun --nproc_per_node gpu "$@" sft.py --model "$llama" --data "$mixture" \
  --out "runs/code-tulu-2-$size" \
  --epochs 2 --batch-size 128 --max-seq-len 8192 --lr 2e-5 --warmup-ratio 0.03 --save-every 250
