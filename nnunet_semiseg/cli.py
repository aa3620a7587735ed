"""The ``nnunet_semiseg`` command: one sub-command is one module in ``commands``."""

from __future__ import annotations

import argparse
import importlib
import sys

from nnunet_semiseg import __version__

# Sub-command -> one line. The module of the same name has add_arguments(parser) and run(args), which returns the
# process's exit code.
COMMANDS = {
    "preprocess": "preprocess the unlabeled cases (imagesUn) with the plans of the labeled ones",
    "split": "write splits_final.json with a few labeled cases and the rest hidden",
    "plan_cpu": "make small plans (nnUNetPlans_cpu) that train on a CPU",
    "trainers": "list the trainers and their options",
    "doctor": "check the installation and, with -d, a dataset",
    "export": "turn a trained model into a plain nnU-Net model folder",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a sub-command; returns the exit code: 0, or 1 after an error, which is printed in one line."""
    parser = argparse.ArgumentParser(prog="nnunet_semiseg", description="Semi-supervised segmentation on nnU-Net v2.")
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, meaning in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=meaning, description=meaning[0].upper() + meaning[1:] + ".")
        # Only the sub-command that runs is imported: the others' imports would take seconds.
        if name in arguments[:1]:
            module = importlib.import_module(f"nnunet_semiseg.commands.{name}")
            module.add_arguments(subparser)
    parsed = parser.parse_args(arguments)
    try:
        return module.run(parsed) or 0
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
