"""Print a markdown table of validation Dice and wall time for trained nnU-Net model folders.

python scripts/dice_table.py MODEL_FOLDER ...
"""

import re
import sys
from datetime import datetime
from pathlib import Path

from nnunet_semiseg.files import read_json


def training_minutes(fold: Path) -> float:
    """Sum of the epochs' durations in the training logs, in minutes."""
    seconds = 0.0
    for log in fold.glob("training_log_*.txt"):
        seconds += sum(float(s) for s in re.findall(r"Epoch time: ([\d.]+) s", log.read_text()))
    return seconds / 60


def main(folders: list[str]) -> None:
    rows = []
    for folder in map(Path, folders):
        fold = folder / "fold_0"
        summary = fold / "validation" / "summary.json"
        if not summary.is_file():
            print(f"{folder.name}: no validation yet", file=sys.stderr)
            continue
        metrics = read_json(summary)
        names = {str(v): k for k, v in read_json(folder / "dataset.json")["labels"].items()}
        dice = {names.get(k, k): m["Dice"] for k, m in metrics["mean"].items()}
        rows.append((folder.name.split("__")[0], dice, metrics["foreground_mean"]["Dice"], training_minutes(fold)))
    if not rows:
        return
    classes = list(rows[0][1])
    print("| trainer | " + " | ".join(classes) + " | mean Dice | training, min |")
    print("|---" * (len(classes) + 3) + "|")
    for trainer, dice, mean, minutes in rows:
        print(f"| {trainer} | " + " | ".join(f"{dice[c]:.3f}" for c in classes) + f" | {mean:.3f} | {minutes:.1f} |")
    print(f"\n{datetime.now():%Y-%m-%d}, nnU-Net's own validation (final checkpoint, sliding window, mirroring).")


if __name__ == "__main__":
    main(sys.argv[1:])
