"""``pseudo_label rounds``: train members, predict unlabeled cases, select, and train again on more."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from nnunet_semiseg.datasets import Dataset, dataset_name
from nnunet_semiseg.executors import LocalExecutor, SlurmExecutor
from nnunet_semiseg.parallel import add_processes_argument
from nnunet_semiseg.segmentations import Classes
from pseudo_label.commands.select import add_rules, read_rules
from pseudo_label.rounds import Rounds, RoundsSettings
from pseudo_label.scores import AGREEMENT
from pseudo_label.scoring import CONSENSUS
from pseudo_label.selection import SelectionRules

# Where no rule is given.
DEFAULT_THRESHOLD = 0.9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, help="dataset id or name, with imagesUn or hidden labels")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans (default %(default)s)")
    parser.add_argument("-o", type=Path, required=True, metavar="WORKDIR", help="folder of the state and of all rounds")
    parser.add_argument(
        "--members", nargs="+", required=True, metavar="TRAINER[:FOLD]", help="the models of the consensus; fold 0"
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="how often the labeled set grows, at most (default %(default)s)"
    )
    parser.add_argument("--consensus", choices=CONSENSUS, help="as for pseudo_label score (default: mean)")
    parser.add_argument(
        "--metric", choices=AGREEMENT, default=AGREEMENT[0], help="metric of the score (default %(default)s)"
    )
    parser.add_argument("--per-slice", action="store_true", help="average the score over slices")
    add_rules(
        parser, f"a case must satisfy --presence and every rule given; without any: --threshold {DEFAULT_THRESHOLD}"
    )
    training = parser.add_argument_group("training")
    training.add_argument("--finetune", action="store_true", help="start from the weights of the round before")
    training.add_argument(
        "--repeat-real",
        type=int,
        metavar="N",
        help="draw a labeled case N times as often as a pseudo-labeled one (default: so that they are a third)",
    )
    training.add_argument(
        "--relabel",
        action="store_true",
        help="predict and select all cases anew in each round",
    )
    training.add_argument(
        "--dataset-ids", type=int, nargs="+", default=[], metavar="ID", help="dataset ids, one for each round"
    )
    training.add_argument("--disable_tta", action="store_true", help="predict without mirroring: faster")
    stop = parser.add_argument_group("stopping")
    stop.add_argument(
        "--max-drop",
        type=float,
        default=0.0,
        metavar="D",
        help="stop when the members' mean validation Dice falls by more than this (default %(default)s)",
    )
    stop.add_argument("--allow-drift", action="store_true", help="continue even if a class has drifted or disappeared")
    parser.add_argument(
        "--annotate", type=int, default=5, metavar="N", help="cases to propose for annotation (default %(default)s)"
    )
    jobs = parser.add_argument_group("jobs")
    jobs.add_argument("--executor", choices=("local", "slurm"), default="local", help="default %(default)s")
    jobs.add_argument(
        "--devices", nargs="+", default=["cuda:0"], help="local: one job each, such as cuda:0 cuda:1, or cpu"
    )
    jobs.add_argument(
        "--parts", type=int, default=1, help="jobs that share a member's prediction (default %(default)s)"
    )
    jobs.add_argument("--partition", help="SLURM partition")
    jobs.add_argument("--gpus", type=int, default=1, help="SLURM: GPUs of a job; 0 for the CPU (default %(default)s)")
    jobs.add_argument("--minutes", type=int, default=1440, help="SLURM: time limit of a job (default %(default)s)")
    jobs.add_argument(
        "--retries", type=int, default=1, help="SLURM: new attempts after a failure (default %(default)s)"
    )
    jobs.add_argument(
        "--slurm", nargs="+", default=[], metavar="NAME=VALUE", help="more options of sbatch, such as mem=64G"
    )
    add_processes_argument(parser)
    parser.add_argument("--print-only", action="store_true", help="print the command lines and exit")


def run(args: argparse.Namespace) -> None:
    dataset = Dataset(dataset_name(args.d))
    rules = read_rules(args, Classes.from_file(dataset.json_file))
    if replace(rules, presence=None, may_be_absent=()) == SelectionRules():
        rules = replace(rules, threshold=DEFAULT_THRESHOLD)
    settings = RoundsSettings(
        dataset=dataset.name,
        configuration=args.c,
        plans=args.p,
        members=tuple(args.members),
        rounds=args.rounds,
        rules=rules,
        dataset_ids=tuple(args.dataset_ids),
        consensus=args.consensus,
        metric=args.metric,
        per_slice=args.per_slice,
        min_agreement=args.min_agreement,
        finetune=args.finetune,
        relabel=args.relabel,
        repeat_real=args.repeat_real,
        max_drop=args.max_drop,
        allow_drift=args.allow_drift,
        annotate=args.annotate,
        disable_tta=args.disable_tta,
    )
    rounds = Rounds(settings, args.o, _executor(args), args.parts, args.np)
    if args.print_only:
        print("\n".join(rounds.describe()))
        return
    print(f"Stopped: {rounds.run(args.command_line)}.")
    for number, of in enumerate(rounds.manifest.rounds):
        dice = ", ".join(f"{name} {value:.4f}" for name, value in of.get("validation", {}).items())
        accepted = f", {len(of['accepted'])} cases accepted" if "accepted" in of else ""
        print(f"Round {number} ({of['dataset']}{accepted}): {f'validation Dice {dice}' if dice else 'not trained'}")
    print(f"Next: pseudo_label report {args.o}")


def _executor(args: argparse.Namespace) -> LocalExecutor | SlurmExecutor:
    if args.executor == "local":
        return LocalExecutor(args.devices)
    parameters = {}
    for text in args.slurm:
        name, equals, value = text.partition("=")
        if not name:
            raise ValueError(f"--slurm {text} is not NAME=VALUE, such as mem=64G")
        parameters[name] = value if equals else True
    return SlurmExecutor(args.o / "slurm", args.partition, args.gpus, args.minutes, parameters, args.retries)
