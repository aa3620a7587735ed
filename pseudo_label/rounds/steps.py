"""The steps of a round in their order, and what stops the rounds after one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pseudo_label.rounds import next_dataset, predicting, scoring, selecting, training
from pseudo_label.rounds.round import Round


def _never(current: Round) -> None:
    return None


@dataclass(frozen=True)
class RoundStep:
    """A part of a round; done when its output is complete and the manifest says so.

    A step that was killed is done again from its inputs, and finds what it had finished.

    Args:
        name: In the manifest.
        run: Does the step; what it returns is put into the round's record.
        reason_to_stop: Why no further step or round follows, or None; asked again when the rounds are continued.
    """

    name: str
    run: Callable[[Round], dict]
    reason_to_stop: Callable[[Round], str | None] = _never


def _classes_drift(current: Round) -> str | None:
    drift = current.record["drift"]
    if drift and not current.setup.settings.allow_drift:
        return (
            f"The classes drift in round {current.number}: {'; '.join(drift)}. Look at {current.folder.path}; "
            "--allow-drift goes on"
        )
    return None


def _nothing_accepted(current: Round) -> str | None:
    return None if current.record["accepted"] else f"No case is accepted in round {current.number}"


def _nothing_left_for_members(current: Round) -> str | None:
    if current.record["remaining"] > 0:
        return None
    needing = [member.trainer for member in current.setup.members if member.learns_from_unlabeled]
    if needing:
        s = current.setup.settings
        return (
            f"Every case has a pseudo label after round {current.number}, and nothing is left for {', '.join(needing)} "
            f"to learn from unlabeled. {current.dataset} has them all: nnUNetv2_train {current.dataset} "
            f"{s.configuration} 0 -p {s.plans}"
        )
    return None


def _worse_or_nothing_left(current: Round) -> str | None:
    before, now = _mean_dice(current.before), _mean_dice(current)
    if now < before - current.setup.settings.max_drop:
        return (
            f"The members' mean validation Dice fell from {before:.4f} to {now:.4f} in round {current.number}: the "
            f"models of round {current.number - 1} are the better ones"
        )
    if current.record["remaining"] == 0 and not current.setup.settings.relabel:
        return f"Every case has a pseudo label after round {current.number}"
    return None


def _mean_dice(current: Round) -> float:
    dice = current.record["validation"].values()
    return sum(dice) / len(dice)


# Round 0 trains the members on the labeled cases.
FIRST = RoundStep("train", training.train_first)
TRAIN = RoundStep("train", training.train, _worse_or_nothing_left)
# Of each round that follows.
STEPS = (
    RoundStep("predict", predicting.predict),
    RoundStep("score", scoring.score, _classes_drift),
    RoundStep("select", selecting.choose, _nothing_accepted),
    RoundStep("build", next_dataset.build, _nothing_left_for_members),
    TRAIN,
)
