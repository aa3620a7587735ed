"""Which scored cases become training cases, and which a person should look at."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from pseudo_label.scores import CaseScore, ClassScore

# --annotate chooses among this many times as many of the worst cases, so that they need not all be of one kind.
ANNOTATE_POOL = 3


@dataclass(frozen=True)
class SelectionRules:
    """What a case has to fulfill; all of the rules that are given.

    Args:
        threshold: Lowest score of a case that is accepted.
        class_thresholds: {class: lowest score of that class, where it is present}.
        max_volume_zscore: Largest distance of a class's volume from the labeled cases' mean, in standard deviations.
        max_components: {class: largest number of connected components}.
        top: The most cases that are accepted: the best ones.
        fraction: The same as a share of the scored cases, rounded down.
        balanced: ``top`` or ``fraction`` by class: the classes take turns, each takes the case that it is best in.
        presence: Classes that at least this share of the labeled cases has must be in the consensus. Members that all
            miss a class agree perfectly, so that no score tells.
        may_be_absent: Classes for which ``presence`` does not count.
    """

    threshold: float | None = None
    class_thresholds: Mapping[str, float] = field(default_factory=dict)
    max_volume_zscore: float | None = None
    max_components: Mapping[str, int] = field(default_factory=dict)
    top: int | None = None
    fraction: float | None = None
    balanced: bool = False
    presence: float | None = None
    may_be_absent: tuple[str, ...] = ()

    def check(self, class_names: Collection[str]) -> None:
        """Raises ValueError if a rule cannot be applied, naming it."""
        shares = {
            "threshold": self.threshold,
            "fraction": self.fraction,
            "presence": self.presence,
            **self.class_thresholds,
        }
        for name, value in shares.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"The {name} of {value:g} is not between 0 and 1")
        if self.presence == 0:
            raise ValueError("A presence of 0 would ask for every class. Use a share above 0, or off")
        if self.max_volume_zscore is not None and not self.max_volume_zscore > 0:
            raise ValueError(f"A largest z-score of {self.max_volume_zscore:g} is not above 0")
        if self.top is not None and self.top < 1:
            raise ValueError(f"The best {self.top} cases are none. Use 1 or more")
        if self.top is not None and self.fraction is not None:
            raise ValueError("Both a number and a share of the best cases are given. Choose one")
        if self.balanced and self.top is None and self.fraction is None:
            raise ValueError("Balancing the classes needs a number of cases, or a share of them")
        unknown = sorted({*self.class_thresholds, *self.max_components, *self.may_be_absent} - set(class_names))
        if unknown:
            raise ValueError(f"There is no class {unknown[0]}. Classes: {', '.join(class_names)}")


@dataclass(frozen=True)
class Decision:
    """Whether a case is accepted.

    Args:
        accepted: There are no reasons against it.
        reasons: Why it is rejected.
        lacking: The classes that ``presence`` asks for and the consensus lacks.
    """

    accepted: bool
    reasons: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()


def select(
    scores: Mapping[str, CaseScore], rules: SelectionRules, labeled: Mapping[str, Mapping[str, float]] | None = None
) -> dict[str, Decision]:
    """A decision for every scored case, in the order of ``scores``.

    A score that equals a threshold is accepted. ``top`` and ``fraction`` choose among the cases that fulfill the other
    rules; equal scores are taken in the order of names.

    Args:
        labeled: {labeled case: {class: its volume}}, for ``presence``.

    Raises:
        ValueError: if a rule compares with labeled cases, and there are none.
    """
    if rules.max_volume_zscore is not None and all(
        own.volume_zscore is None for score in scores.values() for own in score.classes.values()
    ):
        raise ValueError(
            "--max-volume-zscore needs the volumes of two or more labeled cases. Score with -d, or with --labeled"
        )
    if rules.presence is not None and not labeled:
        raise ValueError("--presence needs the volumes of labeled cases. Score with -d, or with --labeled")
    required = _required(labeled, rules.presence, rules.may_be_absent) if labeled and rules.presence is not None else {}
    lacking = {
        case: tuple(name for name in required if not score.classes[name].volume_mm3) for case, score in scores.items()
    }
    reasons = {
        case: _reasons(score, rules, [required[name] for name in lacking[case]]) for case, score in scores.items()
    }
    candidates = [scores[case] for case, found in reasons.items() if not found]
    limit = rules.top if rules.fraction is None else int(rules.fraction * len(scores) + 1e-9)
    if limit is not None:
        order = _by_class(candidates) if rules.balanced else sorted(candidates, key=_best_first)
        for rank, score in enumerate(order, 1):
            if rank > limit:
                what = "in the order of the balanced classes" if rules.balanced else f"by its score {score.score:.4f}"
                reasons[score.case].append(f"number {rank} {what}, {limit} are taken")
    return {case: Decision(not found, tuple(found), lacking[case]) for case, found in reasons.items()}


def _required(
    labeled: Mapping[str, Mapping[str, float]], presence: float, may_be_absent: Collection[str]
) -> dict[str, str]:
    """{class that has to be in the consensus: the reason to reject a case without it}."""
    required = {}
    for name in next(iter(labeled.values())):
        having = sum(of[name] > 0 for of in labeled.values())
        # Rounding may lift the product a little above a whole number.
        if having >= presence * len(labeled) - 1e-9 and name not in may_be_absent:
            required[name] = f"{name} is absent, but {having} of {len(labeled)} labeled cases have it"
    return required


def _best_first(score: CaseScore) -> tuple[float, str]:
    return -_value(score), score.case


def _value(score: CaseScore | ClassScore) -> float:
    """The score; below all others where there is none."""
    return -math.inf if score.score is None else score.score


def _reasons(score: CaseScore, rules: SelectionRules, absences: list[str]) -> list[str]:
    if score.score is None:
        return ["no foreground in the consensus or in any member"]
    found = list(absences)
    if rules.threshold is not None and score.score < rules.threshold:
        found.append(f"score {score.score:.4f} is below {rules.threshold:g}")
    for name, own in score.classes.items():
        lowest = rules.class_thresholds.get(name)
        if lowest is not None and own.score is not None and own.score < lowest:
            found.append(f"score {own.score:.4f} of {name} is below {lowest:g}")
        z, limit = own.volume_zscore, rules.max_volume_zscore
        if limit is not None and z is None:
            found.append(f"the volume of {name} cannot be compared: it is the same in all labeled cases")
        elif limit is not None and z is not None and abs(z) > limit:
            found.append(
                f"volume of {name} is {z:+.1f} standard deviations from the labeled cases', {limit:g} are allowed"
            )
        most = rules.max_components.get(name)
        if most is not None and own.components > most:
            found.append(f"{name} has {own.components} components, {most} are allowed")
    return found


def _by_class(candidates: list[CaseScore]) -> list[CaseScore]:
    """All candidates; the classes take turns, each with the case that it is best in of those that are left."""
    names = list(candidates[0].classes) if candidates else []
    left = {
        name: sorted(
            (score for score in candidates if score.classes[name].score is not None),
            key=lambda score: (-_value(score.classes[name]), score.case),  # noqa: B023 (used at once)
        )
        for name in names
    }
    order: list[CaseScore] = []
    taken: set[str] = set()
    while len(order) < len(candidates):
        for name in names:
            left[name] = [score for score in left[name] if score.case not in taken]
            if left[name]:
                order.append(left[name][0])
                taken.add(left[name][0].case)
    return order


def rejected_to_annotate(scores: Mapping[str, CaseScore], decisions: Mapping[str, Decision], number: int) -> list[str]:
    """Of the rejected cases those that :func:`to_annotate` proposes."""
    left = {case: scores[case] for case, decision in decisions.items() if not decision.accepted}
    lacking = {case for case, decision in decisions.items() if decision.lacking}
    return to_annotate(left, number, lacking)


def to_annotate(scores: Mapping[str, CaseScore], number: int, lacking: Collection[str] = ()) -> list[str]:
    """The cases whose annotation by a person should help most: low agreement, and unlike each other.

    Of the ``ANNOTATE_POOL * number`` cases with the lowest scores the very lowest is taken, then repeatedly the one
    that is farthest from those taken. Cases without foreground come before all others, and then the cases ``lacking`` a
    class, whose scores are too high. The distance is Euclidean over the classes' log volumes and scores, each scaled to
    unit standard deviation over the pool.
    """
    worst = sorted(scores.values(), key=lambda s: (s.score is not None, s.case not in lacking, s.score or 0.0, s.case))
    pool = worst[: ANNOTATE_POOL * number]
    if not pool:
        return []
    features = np.array(
        [[v for own in s.classes.values() for v in (math.log1p(own.volume_mm3), own.score or 0.0)] for s in pool]
    )
    spread = features.std(0)
    features = features / np.where(spread > 0, spread, 1.0)
    chosen = [0]
    distance = np.linalg.norm(features - features[0], axis=1)
    while len(chosen) < min(number, len(pool)):
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(features - features[chosen[-1]], axis=1))
    return [pool[i].case for i in chosen]
