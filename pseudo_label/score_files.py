"""What ``pseudo_label score`` leaves in its folder."""

from __future__ import annotations

from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_semiseg.datasets import plans_reader
from nnunet_semiseg.files import read_json, remove, write_csv
from nnunet_semiseg.segmentations import Classes
from pseudo_label.scores import CaseScore, ClassScore

# In the order in which --overwrite removes them: without cases.csv the folder is not finished, and a case without its
# file is not done.
_OUTPUTS = ("cases.csv", "cases", "scores.csv", "labeled_volumes.json", "consensus", "disagreement", "entropy")


def check_out(out: Path, settings: dict, overwrite: bool) -> None:
    """Raises ValueError or OSError, naming the folder, if it has other files, or scores with other settings."""
    file = out / "score.json"
    if not file.is_file():
        if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise ValueError(f"{out} has other files and no score.json. Choose a new or empty folder for -o")
        return
    before = settings if overwrite else read_json(file, settings, "Use --overwrite to score again, or another -o")
    for key, value in settings.items():
        if before[key] != value:
            raise ValueError(
                f"{out} was scored with {key} {_shown(before[key])}, not {_shown(value)}. Use --overwrite to score "
                "it anew, or another -o"
            )


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {'+'.join(map(str, values))}" for name, values in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def remove_scores(out: Path) -> None:
    for name in _OUTPUTS:
        remove(out / name)


def _check_scored(out: Path) -> None:
    if not (out / "score.json").is_file():
        raise FileNotFoundError(f"{out} has no score.json. Score members into it: pseudo_label score -i ... -o {out}")


def scored_classes(scored: Path) -> Classes:
    """The classes of a folder that ``pseudo_label score`` wrote."""
    _check_scored(scored)
    settings = read_json(
        scored / "score.json", ("classes", "regions_class_order", "ignore"), "Score again with --overwrite"
    )
    values = tuple(map(tuple, settings["classes"].values()))
    order, ignore = settings["regions_class_order"], settings["ignore"]
    known = {0, *np.concatenate(values).tolist(), *(order or ()), *(() if ignore is None else (ignore,))}
    return Classes(tuple(settings["classes"]), values, ignore, order and tuple(order), frozenset(known))


def scored_reader(scored: Path) -> type[BaseReaderWriter] | None:
    """nnU-Net's reader of the label maps that ``pseudo_label score`` wrote; None for that of their ending."""
    name = read_json(scored / "score.json").get("reader")
    return name and plans_reader({"image_reader_writer": name}, scored / "score.json")


def read_labeled_volumes(out: Path) -> dict[str, dict[str, float]]:
    """{labeled case: {class: its volume in mm3}} of a scored folder; empty if it was compared with none."""
    file = Path(out) / "labeled_volumes.json"
    return read_json(file, cure="Score again with --overwrite") if file.is_file() else {}


def read_scores(out: Path) -> dict[str, CaseScore]:
    """{case: its scores} that :func:`score_members` left in a folder, sorted.

    Raises:
        FileNotFoundError: if the folder is not scored, or not all of its cases.
        ValueError: naming the file that is damaged.
    """
    out = Path(out)
    _check_scored(out)
    # It is written when all cases are done.
    if not (out / "cases.csv").is_file():
        raise FileNotFoundError(
            f"{out} has no cases.csv, so not all of its cases are scored. Run the same pseudo_label score again"
        )
    return read_finished(out)


def read_finished(out: Path) -> dict[str, CaseScore]:
    """As ``read_scores``, of the cases that are done."""
    scores = {}
    for file in sorted((out / "cases").glob("[!.]*.json"), key=lambda file: file.stem):
        again = "Remove it, and run the same pseudo_label score again"
        content = read_json(file, ("members", *(field.name for field in fields(CaseScore))), again)
        del content["members"]
        try:
            content["classes"] = {name: ClassScore(**values) for name, values in content["classes"].items()}
            scores[content["case"]] = CaseScore(**content)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{file} does not hold what pseudo_label score writes ({error}). {again}") from None
    return scores


def write_tables(out: Path, scores: dict[str, CaseScore]) -> None:
    write_csv(
        out / "scores.csv",
        ["case", "class", *(field.name for field in fields(ClassScore))],
        ([case, name, *astuple(values)] for case, score in scores.items() for name, values in score.classes.items()),
    )
    write_csv(
        out / "cases.csv",
        [field.name for field in fields(CaseScore)[:-1]],
        (astuple(score)[:-1] for score in scores.values()),
    )
