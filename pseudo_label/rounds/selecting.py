"""Which cases get their consensus as a label, and which a person should annotate."""

from __future__ import annotations

from pseudo_label.rounds import command_lines
from pseudo_label.rounds.round import Round
from pseudo_label.score_files import read_labeled_volumes, read_scores
from pseudo_label.selection import rejected_to_annotate, select
from pseudo_label.selection_files import export_for_annotation, write_selection


def choose(current: Round) -> dict:
    """{"select_command": a line that does the same, "accepted": cases, "annotate": cases}."""
    setup, s, folder = current.setup, current.setup.settings, current.folder
    scores = read_scores(folder.scores)
    decisions = select(scores, s.rules, read_labeled_volumes(folder.scores))
    annotate = rejected_to_annotate(scores, decisions, s.annotate)
    if annotate:
        export_for_annotation(
            folder.scores,
            folder.selection / "annotate",
            annotate,
            scores,
            {case: setup.cases.unlabeled[case] for case in annotate},
            setup.classes,
            setup.first.json["channel_names"],
        )
    write_selection(folder.scores, folder.selection, decisions, scores, setup.classes, s.min_agreement)
    return {
        "select_command": command_lines.selecting(setup, current.number),
        "accepted": [case for case, decision in decisions.items() if decision.accepted],
        "annotate": annotate,
    }
