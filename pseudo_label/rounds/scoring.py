"""Agreement of the members in a round, and whether the classes drift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pseudo_label.rounds import command_lines
from pseudo_label.rounds.links import link_labels
from pseudo_label.rounds.round import Round
from pseudo_label.rounds.setup import Setup
from pseudo_label.score_files import read_labeled_volumes, read_scores
from pseudo_label.scores import CaseScore
from pseudo_label.scoring import score_members

# A class whose mean volume changes by more than this factor has drifted: from the labeled cases, which are few and
# other ones, and from a round to the next, on the same cases.
DRIFT_FROM_LABELED, DRIFT_BETWEEN_ROUNDS = 3.0, 2.0


def score(current: Round) -> dict:
    """{"score_command": a line that does the same, "drift": what is suspicious, "mean_score": over the cases}."""
    setup, s = current.setup, current.setup.settings
    scores = score_members(
        [current.folder.predictions(member.name) for member in setup.members],
        current.folder.scores,
        setup.classes,
        s.consensus or "mean",
        s.per_slice,
        s.metric,
        labeled=link_labels_of_training_cases(setup),
        processes=setup.processes,
        # On the few cases that are left members that differ may agree.
        allow_identical=current.number > 1,
        reader=setup.reader,
    )
    return {
        "score_command": command_lines.scoring(setup, current.number),
        "drift": _drift(current, scores),
        "mean_score": _mean(score.score for score in scores.values() if score.score is not None),
    }


def link_labels_of_training_cases(setup: Setup) -> Path:
    """A folder of links: the volumes of hidden and of validation cases are none of the rounds' business."""
    folder = setup.work.labeled
    for case in setup.cases.training:
        link_labels(setup.cases.labeled[case][1], folder / f"{case}{setup.first.file_ending}")
    return folder


def _drift(current: Round, scores: Mapping[str, CaseScore]) -> list[str]:
    """What is suspicious about the classes' mean volumes: one line for each class, empty if nothing is.

    Round 1 is compared with the labeled cases; a later one with the round before and, so that small steps do not add
    up unseen, with round 1. That is on the cases that both have: those that are left are harder ones, which is no
    drift.
    """
    volumes, number = _volumes(scores, scores), current.number
    if number == 1:
        labeled = read_labeled_volumes(current.folder.scores)
        compared = [("the labeled cases", list(labeled.values()), DRIFT_FROM_LABELED)]
    else:
        # In round 2 the round before is round 1.
        factors = {number - 1: DRIFT_BETWEEN_ROUNDS}
        factors.setdefault(1, DRIFT_FROM_LABELED)
        compared = [
            (f"round {i}", _volumes(read_scores(current.earlier(i).folder.scores), scores), factor)
            for i, factor in factors.items()
        ]
    found = []
    for name in current.setup.classes.names:
        new = _mean(of[name] for of in volumes)
        for what, before, factor in compared:
            old = _mean(of[name] for of in before)
            if new is None or not old:
                continue
            if new == 0:
                found.append(f"no case has {name}")
                break
            if not 1 / factor <= new / old <= factor:
                found.append(f"{name} has {new:.3g} mm3 in the mean case, in {what} it has {old:.3g}")
                break
    return found


def _volumes(scores: Mapping[str, CaseScore], cases: Iterable[str]) -> list[dict[str, float]]:
    """The volume of each class, of each of the cases."""
    return [{name: own.volume_mm3 for name, own in scores[case].classes.items()} for case in cases]


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
