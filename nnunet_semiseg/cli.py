"""The ``nnunet_semiseg`` command: one sub-command is one module."""

from __future__ import annotations

import argparse
import importlib
import io
import shlex
import sys

from nnunet_semiseg import __version__

# {sub-command: (module, one line)}. The module has add_arguments(parser) and run(args), which returns the exit code of
# the process; args.command_line is the whole command. Of packages that build on this one, only names are known here.
COMMANDS = {
    "preprocess": (
        "nnunet_semiseg.commands.preprocess",
        "preprocess the unlabeled cases (imagesUn) with the plans of the labeled ones",
    ),
    "convert": (
        "dataset_conversion.convert",
        "turn a public download, or folders of images and labels, into an nnU-Net dataset",
    ),
    "split": (
        "nnunet_semiseg.commands.split",
        "write splits_final.json with a few labeled cases and the rest hidden",
    ),
    "plan_cpu": ("nnunet_semiseg.commands.plan_cpu", "make small plans (nnUNetPlans_cpu) that train on a CPU"),
    "trainers": ("nnunet_semiseg.commands.trainers", "list the trainers and their options"),
    "doctor": ("nnunet_semiseg.commands.doctor", "check the installation and, with -d, a dataset"),
    "fork": (
        "nnunet_semiseg.commands.fork",
        "make a training start from a whole trained model, without its phase on labels alone",
    ),
    "evaluate": (
        "nnunet_semiseg.commands.evaluate",
        "compare predictions with ground truth: overlap and surface distances for each case and class",
    ),
    "compare": (
        "nnunet_semiseg.commands.compare",
        "test whether models differ, from their evaluations on the same cases",
    ),
    "rank": (
        "nnunet_semiseg.commands.rank",
        "rank teams as the FLARE22 challenge does, from their scores and measurements",
    ),
    "measure": (
        "nnunet_semiseg.commands.measure",
        "measure time, memory, CPU and GPU of predicting each case, by an image or a command",
    ),
    "benchmark": (
        "nnunet_semiseg.commands.benchmark",
        "train methods on the same few labels, side by side with nnU-Net, and write what each one gains",
    ),
    "predict": ("nnunet_semiseg.commands.predict", "predict with plain nnU-Net models, fast and without torch"),
    "export": ("nnunet_semiseg.commands.export", "turn a trained model into a plain nnU-Net model folder"),
}


def run_command(prog: str, description: str, commands: dict[str, tuple[str, str]], arguments: list[str]) -> int:
    """Run a sub-command of a table such as ``COMMANDS``.

    Returns:
        The exit code: the sub-command's own, or 1 after an error, which is printed in one line.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, meaning) in commands.items():
        subparser = subparsers.add_parser(name, help=meaning, description=meaning[0].upper() + meaning[1:] + ".")
        # Only the sub-command that runs is imported: the others' imports would take seconds.
        if name in arguments[:1]:
            module = importlib.import_module(module_name)
            module.add_arguments(subparser)
    parsed = parser.parse_args(arguments)
    parsed.command_line = shlex.join([prog, *arguments])
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that knows ASCII alone shows a question mark for the others.
        sys.stdout.reconfigure(errors="replace")
    try:
        return module.run(parsed) or 0
    except (ValueError, OSError, RuntimeError, NotImplementedError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    return run_command("nnunet_semiseg", "Semi-supervised segmentation on nnU-Net v2.", COMMANDS, arguments)


if __name__ == "__main__":
    sys.exit(main())
