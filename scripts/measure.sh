#!/usr/bin/env bash
# Train several trainers on one dataset with equal settings and print their validation Dice.
#
#   scripts/measure.sh DATASET CONFIGURATION PLANS COMMON_SETTINGS TRAINER[:OWN_SETTINGS] ...
#
# e.g. scripts/measure.sh 501 2d nnUNetPlans_cpu _10epochs_seed=1 vanilla MeanTeacher CoraNet
# vanilla is nnU-Net's own trainer. Finished runs are kept, a killed one continues.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dataset=$1 configuration=$2 plans=$3 common=$4
shift 4
device=${DEVICE:-cpu}
folders=()
name=$(cd "$nnUNet_preprocessed" && ls -d Dataset"$(printf %03d "$dataset")"_*)
for spec in "$@"; do
    trainer=${spec%%:*}
    trainer=nnUNetTrainer${trainer#vanilla}$common
    [[ $spec == *:* ]] && trainer+=${spec#*:}
    folder=$nnUNet_results/$name/${trainer}__${plans}__$configuration
    folders+=("$folder")
    [[ -f $folder/fold_0/validation/summary.json ]] && continue
    resume=()
    compgen -G "$folder/fold_0/checkpoint_*.pth" > /dev/null && resume=(--c)
    mkdir -p "$folder"
    nnUNetv2_train "$dataset" "$configuration" 0 -p "$plans" -tr "$trainer" -device "$device" "${resume[@]}" \
        >> "$folder/run.log" 2>&1 || { echo "$trainer failed; see $folder/run.log" >&2; tail -n 5 "$folder/run.log" >&2; }
done
python "$here/dice_table.py" "${folders[@]}"
