#!/usr/bin/env bash
# QLoRA: Llama 2 fine-tuned on the Tulu V2 mixture by adapters, its own weights in 4 bits.
#
#   runs/qlora.sh 7b|13b|70b LLAMA_DIR MIXTURE [torchrun's flags, e.g. --nnodes 2 …]
#
# LLAMA_DIR: Llama 2 as a Hugging Face folder. MIXTURE: the Tulu V2 mixture (mixture.py's, or the
# released data set). Uses all GPUs of the machine. The result is runs/tulu-2-qlora-SIZE, merged,
# with the adapter for PEFT in its adapter/. Run it again after an interruption: it continues.
#
# Hyper-parameters: Ivison et al. 2023, table 5 and appendix B; open-instruct
# scripts/finetune_qlora_with_accelerate.sh.
set -euo pipefail
if (($# < 3)); then
  echo "error: found $# arguments, expected 7b|13b|70b LLAMA_DIR MIXTURE" >&2
  exit 2
fi
size=$1 llama=$(realpath -m "$2") mixture=$(realpath -m "$3")
shift 3
case $size in
  7b | 13b | 70b) ;;
  *) echo "error: size is $size, expected 7b, 13b or 70b" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
torchrun --nproc_per_node gpu "$@" sft.py --model "$llama" --data "$mixture" \
  --out "runs/tulu-2-qlora-$size" \
  --lora-rank 64 --lora-alpha 16 --lora-dropout 0.1 --quantize nf4 \
  --epochs 5 --batch-size 128 --max-seq-len 4096 --lr 1e-4 --warmup-ratio 0.03 --save-every 250
