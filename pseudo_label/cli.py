"""The ``pseudo_label`` command: one sub-command is one module in ``commands``."""

from __future__ import annotations

import sys

from nnunet_semiseg.cli import run_command

COMMANDS = {
    "score": "form the consensus of several models' predictions and score how well they agree",
    "select": "decide by the scores which cases become training cases, and which a person should annotate",
    "rounds": "train members, predict unlabeled cases, select, and train again on more",
    "report": "write report.html and report.json of what rounds did",
}


def main(arguments: list[str] | None = None) -> int:
    return run_command(
        "pseudo_label",
        "Pseudo labels by consensus.",
        "pseudo_label.commands",
        COMMANDS,
        sys.argv[1:] if arguments is None else arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
