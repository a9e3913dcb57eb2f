#!/usr/bin/env bash
# From a CSV file of one's own to a conversation with the trained model:
#   trainer/examples/csv_to_chat.sh MODEL pairs.csv outputs/mine [further fields, as --max_steps 20]
# The file has a header and, in each row, a question, its better and its worse answer.
set -euo pipefail
model=$1 file=$2 out=$3
shift 3

rpo train --model_name_or_path "$model" --train_file "$file" \
  --prompt_column question --chosen_column better --rejected_column worse \
  --eval_split_ratio 0.2 --eval_steps 5 --metric_for_best_model rewards/margins \
  --output_dir "$out" "$@"
python "$(dirname "$0")/what_went_wrong.py" "$out"
rpo chat "$out/model"
