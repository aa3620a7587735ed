#!/usr/bin/env bash
# From nothing to a result: vanilla nnU-Net against CoraNet, on 2 CPU cores, in at most 12 minutes.
#
#   bash scripts/demo.sh                   simulated brains (32 subjects made from one average brain)
#   bash scripts/demo.sh DATASET_FOLDER    your own nnU-Net dataset (DatasetNNN_Name with imagesTr, labelsTr, imagesUn)
#
# Everything lands in demo_work (or $DEMO_WORK). A second run reuses what is done; a killed one continues.
# PYTHON names the interpreter that makes the environment; DEMO_ENV an environment that exists already.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${DEMO_WORK:-$root/demo_work}
mkdir -p "$work"
work=$(cd "$work" && pwd)
start=$SECONDS
say() { printf '\n[%3d s] %s\n' $((SECONDS - start)) "$*"; }

env=${DEMO_ENV:-$work/env}
if [[ ! -x $env/bin/nnunet_semiseg ]]; then
    say "Making an environment in $env and installing nnunet-semiseg (about 2 minutes)"
    [[ -x $env/bin/python ]] || "${PYTHON:-python3}" -m venv "$env"
    "$env/bin/python" -m pip install -q --disable-pip-version-check "$root[demo]"
fi
export PATH=$env/bin:$PATH
export nnUNet_raw=$work/nnUNet_raw nnUNet_preprocessed=$work/nnUNet_preprocessed nnUNet_results=$work/nnUNet_results
export nnUNet_compile=f nnUNet_def_n_proc=2 nnUNet_n_proc_DA=${nnUNet_n_proc_DA:-2} PYTHONWARNINGS=ignore
mkdir -p "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results"

if [[ $# -gt 0 ]]; then
    [[ -d $1 ]] || { echo "Error: there is no folder $1" >&2; exit 1; }
    source=$(cd "$1" && pwd)
    dataset=$(basename "$source")
    [[ $dataset =~ ^Dataset[0-9]{3}_ ]] || { echo "Error: $source is not called DatasetNNN_Name" >&2; exit 1; }
    ln -sfn "$source" "$nnUNet_raw/$dataset"
else
    dataset=Dataset999_SimulatedBrains
    if [[ ! -f $nnUNet_raw/$dataset/dataset.json ]]; then
        say "Simulating 32 subjects from the MNI152 average brain: 2 labeled, 22 unlabeled, 6 held out"
        python "$root/scripts/demo.py" simulate "$nnUNet_raw/$dataset"
    fi
fi
number=${dataset:7:3}
plans=nnUNetPlans_cpu
log=$work/$dataset.log

if [[ ! -f $nnUNet_preprocessed/$dataset/.planned ]]; then
    say "Planning and preprocessing the labeled cases (log: $log)"
    {
        nnUNetv2_extract_fingerprint -d "$number" -np 2
        nnunet_semiseg plan_cpu -d "$number" -features 8
        nnUNetv2_preprocess -d "$number" -plans_name $plans -c 2d -np 2
    } >> "$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
    [[ $dataset == *_SimulatedBrains ]] && python "$root/scripts/demo.py" split "$nnUNet_raw/$dataset"
    touch "$nnUNet_preprocessed/$dataset/.planned"
fi
if [[ -d $nnUNet_raw/$dataset/imagesUn ]]; then
    say "Preprocessing the unlabeled cases"
    nnunet_semiseg preprocess -d "$number" -c 2d -p $plans -np 2
fi

fold=$(python "$root/scripts/demo.py" heldout "$nnUNet_raw/$dataset" "$work/$dataset.heldout")
common=_10epochs_num_iterations_per_epoch=100_num_val_iterations_per_epoch=5_save_every=2_seed=1
vanilla=nnUNetTrainer$common
coranet=nnUNetTrainerCoraNet$common
runs=("vanilla $vanilla $fold" "CoraNet $coranet $fold")
# What the labels that the others do not see would be worth.
[[ $dataset == *_SimulatedBrains ]] && runs+=("all-labels $vanilla 1")
scored=()
for run in "${runs[@]}"; do
    read -r name trainer of <<< "$run"
    model=$nnUNet_results/$dataset/${trainer}__${plans}__2d
    if [[ ! -f $model/fold_$of/checkpoint_final.pth ]]; then
        say "nnUNetv2_train $number 2d $of -tr $trainer -p $plans -device cpu"
        resume=()
        compgen -G "$model/fold_$of/checkpoint_*.pth" > /dev/null && resume=(--c)
        # The final validation is of few cases; the held-out cases below are what counts.
        nnUNetv2_train "$number" 2d "$of" -tr "$trainer" -p $plans -device cpu "${resume[@]}" 2>&1 | tee -a "$log" |
            grep --line-buffered -E "^[-0-9: .]+Epoch [0-9]+|Pseudo dice|Error" || true
        [[ -f $model/fold_$of/checkpoint_final.pth ]] || { tail -n 20 "$log" >&2; exit 1; }
    fi
    predicted=$work/$dataset.$name
    if [[ ! -f $predicted/summary.json ]]; then
        say "nnUNetv2_predict of the held-out cases"
        nnUNetv2_predict -d "$number" -c 2d -f "$of" -tr "$trainer" -p $plans -device cpu -npp 1 -nps 1 \
            -i "$work/$dataset.heldout/images" -o "$predicted" >> "$log" 2>&1 || { tail -n 20 "$log" >&2; exit 1; }
        nnUNetv2_evaluate_folder "$work/$dataset.heldout/labels" "$predicted" -djfile "$predicted/dataset.json" \
            -pfile "$predicted/plans.json" -o "$predicted/summary.json" >> "$log" 2>&1
    fi
    scored+=("$name=$predicted")
done

say "Held-out cases, mean Dice (1000 steps each)"
python "$root/scripts/demo.py" table "${scored[@]}"
python "$root/scripts/demo.py" picture "$work/$dataset.heldout" "$work/$dataset.vanilla" "$work/$dataset.CoraNet" \
    "$nnUNet_results/$dataset/${coranet}__${plans}__2d/fold_$fold" "$work/$dataset.png"
say "Done. Picture: $work/$dataset.png"
