#!/usr/bin/env bash
# Tulu 2 and Tulu 2+DPO: supervised fine-tuning on the Tulu V2 mixture, then DPO on UltraFeedback.
#
#   runs/tulu2.sh 7b|13b|70b LLAMA_DIR MIXTURE PREFERENCES [torchrun's flags, e.g. --nnodes 4 …]
#
# LLAMA_DIR: Llama 2 as a Hugging Face folder. MIXTURE: the Tulu V2 mixture (mixture.py's, or the
# released data set). PREFERENCES: ultrafeedback_binarized, train_prefs of November 2023.
# Uses all GPUs of the machine. The results are runs/tulu-2-SIZE and runs/tulu-2-dpo-SIZE. Run it
# again after an interruption: it continues.
#
# Hyper-parameters: Ivison et al. 2023, appendix B. All other settings are the programs' defaults.
set -euo pipefail
if (($# < 4)); then
  echo "error: found $# arguments, expected 7b|13b|70b LLAMA_DIR MIXTURE PREFERENCES" >&2
  exit 2
fi
size=$1 llama=$(realpath -m "$2") mixture=$(realpath -m "$3") preferences=$(realpath -m "$4")
shift 4
case $size in
  7b | 13b) rate=2e-5 ;;
  70b) rate=1e-5 ;;
  *) echo "error: size is $size, expected 7b, 13b or 70b" >&2; exit 2 ;;
esac
cd "$(dirname "$0")/.."
launch=(torchrun --nproc_per_node gpu "$@")
if [[ ! -e runs/tulu-2-$size/config.json ]]; then # written last: SFT is done
  "${launch[@]}" sft.py --model "$llama" --data "$mixture" --out "runs/tulu-2-$size" \
    --epochs 2 --batch-size 128 --max-seq-len 8192 --lr $rate --warmup-ratio 0.03 --save-every 250
fi
"${launch[@]}" dpo.py --model "runs/tulu-2-$size" --data "$preferences" \
  --out "runs/tulu-2-dpo-$size" \
  --epochs 3 --batch-size 32 --max-seq-len 8192 --lr 5e-7 --warmup-ratio 0.1 --beta 0.1 --save-every 250
