"""The ``pseudo_label`` command: one sub-command is one module."""

from __future__ import annotations

import sys

from nnunet_semiseg.cli import run_command

COMMANDS = {
    "score": (
        "pseudo_label.commands.score",
        "form the consensus of several models' predictions and score how well they agree",
    ),
    "select": (
        "pseudo_label.commands.select",
        "select by score which cases become training cases, and which a person should annotate",
    ),
    "rounds": (
        "pseudo_label.commands.rounds",
        "train members, predict unlabeled cases, select, and train again on more",
    ),
    "report": ("pseudo_label.commands.report", "write report.html and report.json about what rounds did"),
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return run_command("pseudo_label", "Pseudo labels by consensus.", COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
