"""How good were the pseudo labels of ``pseudo_label rounds``? Compares them with withheld labels.

    python scripts/check_rounds.py WORKDIR FOLDER_OF_LABELS

Prints, for each round: Spearman's and Pearson's correlation of score and true Dice over the cases that were scored, the
mean true Dice (mean over classes, then over cases) of accepted and of rejected ones and of each member's own
predictions, and the validation Dice of the members.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import pearsonr, spearmanr

from nnunet_semiseg.segmentations import Classes, find_files, read_labels
from pseudo_label.report import collect
from pseudo_label.rounds.work_folder import WorkFolder
from pseudo_label.score_files import scored_classes


def true_dice(predicted: Path, truth: Path, classes: Classes) -> float:
    """Mean over the classes that either map has."""
    maps = [read_labels(file, classes.known)[0] for file in (predicted, truth)]
    values = []
    for label in classes.values:
        found, real = (np.isin(labels, label) for labels in maps)
        size = np.count_nonzero(found) + np.count_nonzero(real)
        if size:
            values.append(2 * np.count_nonzero(found & real) / size)
    return float(np.mean(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("labels", type=Path)
    args = parser.parse_args()
    content, truth = collect(args.workdir), find_files(args.labels)
    members = content["members"]
    print("| round | cases | Spearman | Pearson | true Dice: consensus | accepted | rejected | of members |")
    print("|" + "---|" * 8)
    for of in content["rounds"]:
        folder = WorkFolder(args.workdir).round(of["number"])
        if not of["cases"] or of["accepted"] is None:
            continue
        classes, consensus = scored_classes(folder.scores), find_files(folder.scores / "consensus")
        cases = [case["case"] for case in of["cases"]]
        scores = np.array([np.nan if case["score"] is None else case["score"] for case in of["cases"]])
        dice = np.array([true_dice(consensus[case], truth[case], classes) for case in cases])
        accepted, scored = np.isin(cases, of["accepted"]), ~np.isnan(scores)
        own = []
        for member in members:
            files = find_files(folder.predictions(member["name"]))
            own.append(np.mean([true_dice(files[case], truth[case], classes) for case in cases]))
        correlations = [test(scores[scored], dice[scored]).statistic for test in (spearmanr, pearsonr)]
        print(
            f"| {of['number']} | {len(cases)} | {correlations[0]:.2f} | {correlations[1]:.2f} | {dice.mean():.3f} | "
            f"{dice[accepted].mean():.3f} | {dice[~accepted].mean():.3f} | {', '.join(f'{d:.3f}' for d in own)} |"
        )
    print(f"\n| validation Dice after | {' | '.join(m['short'] for m in members)} | mean |")
    print("|" + "---|" * (len(members) + 2))
    for of in content["rounds"]:
        if of["validation_dice"]:
            dice = [of["validation_dice"][member["name"]] for member in members]
            print(f"| round {of['number']} | {' | '.join(f'{d:.3f}' for d in dice)} | {np.mean(dice):.3f} |")
    for member in members:
        print(f"\n{member['short']}: {member['trainer']}, fold {member['fold']}")


if __name__ == "__main__":
    main()
