#!/usr/bin/env bash
# Tulu 2 and Tulu 2+DPO: supervised fine-tuning on the Tulu V2 mixture, then DPO on UltraFeedback.
#
#   runs/tulu2.sh 7b|13b|70b LLAMA_DIR MIXTURE_FILE PREFERENCES_FILE [torchrun's flags, e.g. --nnodes 4 …]
#
# LLAMA_DIR: Llama 2 as a Hugging Face folder. MIXTURE_FILE: the Tulu V2 mixture (mixture.py, or the
# released data set). PREFERENCES_FILE: ultrafeedback_binarized, train_prefs of November 2023.
# Hyper-parameters: Ivison et al. 2023, appendix B. What is not named here is the scripts' default.
set -euo pipefail
size=$1 llama=$2 mixture=$3 preferences=$4
shift 4
cd "$(dirname "$0")/.."
case $size in
  7b | 13b) rate=2e-5 ;;
  70b) rate=1e-5 ;;
  *) echo "error: size is $size, expected 7b, 13b or 70b" >&2; exit 2 ;;
esac
launch=(torchrun --nproc_per_node gpu "$@")
"${launch[@]}" sft.py --model "$llama" --data "$mixture" --out "runs/tulu-2-$size" \
  --epochs 2 --batch-size 128 --max-seq-len 8192 --lr $rate --warmup-ratio 0.03 --save-every 250
"${launch[@]}" dpo.py --model "runs/tulu-2-$size" --data "$preferences" --out "runs/tulu-2-dpo-$size" \
  --epochs 3 --batch-size 32 --max-seq-len 8192 --lr 5e-7 --warmup-ratio 0.1 --beta 0.1 --save-every 250
