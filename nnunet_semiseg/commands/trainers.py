"""``nnunet_semiseg trainers``: the trainers and their options, read off the classes."""

from __future__ import annotations

import argparse
import inspect
import textwrap

from nnunet_semiseg.trainers.frame import FrameOptions, SemiSupervisedTrainer
from nnunet_semiseg.trainers.options import ScheduleOptions, described
from nnunet_semiseg.trainers.registry import TRAINERS

_COLUMNS = ("name", "type", "default", "valid", "meaning")

# What a forward pass without a gradient costs, in passes with one.
_FORWARD = 1 / 3
# What a second network of the other architecture costs, in passes of the first: a residual encoder beside a plain one.
_OTHER_ARCHITECTURE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="*", metavar="TRAINER", help="only these trainers")
    parser.add_argument("--all", action="store_true", help="the options for ablations of the papers as well")
    pages = parser.add_mutually_exclusive_group()
    pages.add_argument("--markdown", action="store_true", help="print the page docs/trainers.md")
    pages.add_argument("--overview", action="store_true", help="print the table of the README")


def run(args: argparse.Namespace) -> None:
    unknown = [name for name in args.names if name not in TRAINERS]
    if unknown:
        raise ValueError(f"There is no trainer {unknown[0]}. There are {', '.join(TRAINERS)}")
    chosen = {name: cls for name, cls in TRAINERS.items() if name in args.names or not args.names}
    print(overview(chosen) if args.overview else markdown(chosen) if args.markdown else plain(chosen, args.all), end="")


def _summary(trainer: type) -> str:
    return (inspect.getdoc(trainer) or "").split("\n\n")[0].replace("\n", " ")


def _use(trainer: type[SemiSupervisedTrainer]) -> str:
    return f"Use it {trainer.use_when}. A step takes about {step_cost(trainer):.1f} times as long as nnU-Net's."


def _presets(options_class: type) -> str:
    presets = getattr(options_class, "PRESETS", {})
    return "".join(
        f"`preset={name}`: {', '.join(f'`{k}={v}`' for k, v in values.items())}.\n\n"
        for name, values in presets.items()
    )


def _own(options_class: type) -> list[dict]:
    """The options that a trainer does not share with all others, or has another default of; ablations come last."""
    shared = {row["name"]: row["default"] for row in described(FrameOptions)}
    rows = [row for row in described(options_class) if shared.get(row["name"]) != row["default"]]
    return sorted(rows, key=lambda row: row["ablation"])


def _markdown_table(rows: list[dict]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    table = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    for row in rows:
        row = {**row, "meaning": row["meaning"] + " (ablation)" * row["ablation"]}
        table.append(
            "| " + " | ".join(cell(f"`{row[c]}`" if c in ("name", "default") else row[c]) for c in _COLUMNS) + " |"
        )
    return "\n".join(table) + "\n"


def _facts(trainer: type[SemiSupervisedTrainer]) -> str:
    source = f"Source: {trainer.paper.citation}." if trainer.paper else ""
    corrected = f" Corrected here: {trainer.corrected}." if trainer.corrected else ""
    return f"{_use(trainer)}\n\n{source}{corrected}\n\n"


def step_cost(trainer: type[SemiSupervisedTrainer]) -> float:
    """What a training step costs, in steps of nnU-Net, estimated from the passes through the networks."""
    gradient, forward, second_gradient, second_forward = trainer.passes
    second = _OTHER_ARCHITECTURE if getattr(trainer.Options, "second_network", "") == "other" else 1
    return gradient + _FORWARD * forward + second * (second_gradient + _FORWARD * second_forward)


def overview(trainers: dict) -> str:
    """The table of trainers in the README."""
    rows = [
        f"| `{name}` | {trainer.idea} | {step_cost(trainer):.1f} | {trainer.use_when} | {trainer.paper.citation} |\n"
        for name, trainer in trainers.items()
    ]
    return "| trainer | idea | cost | when to use | source |\n|---|---|---|---|---|\n" + "".join(rows)


def markdown(trainers: dict) -> str:
    """The page docs/trainers.md."""
    parts = [
        "# Trainers\n\nMade by `nnunet_semiseg trainers --markdown`; do not edit by hand.\n\nAn option is set in the "
        "trainer's name: `-tr nnUNetTrainerCoraNet_100epochs_alpha=10`.\n"
    ]
    for name, trainer in trainers.items():
        parts.append(
            f"\n## {name}\n\n{_facts(trainer)}{inspect.getdoc(trainer)}\n\n{_presets(trainer.Options)}"
            f"{_markdown_table(_own(trainer.Options))}"
        )
    parts.append(f"\n## Every trainer: seed, views and mixing\n\n{_markdown_table(described(FrameOptions))}")
    parts.append(f"\n## Every trainer: nnU-Net's schedule\n\n{_markdown_table(described(ScheduleOptions))}")
    return "".join(parts)


def plain(trainers: dict, ablations: bool) -> str:
    """The table as printed on a terminal."""

    def table(rows: list[dict]) -> str:
        rows = [row for row in rows if ablations or not row["ablation"]]
        widths = {c: max(len(row[c]) for row in rows) for c in _COLUMNS[:-1]}
        return "".join(
            "  " + "  ".join(row[c].ljust(widths[c]) for c in _COLUMNS[:-1]) + "  " + row["meaning"] + "\n"
            for row in rows
        )

    parts = []
    for name, trainer in trainers.items():
        facts = "\n".join(textwrap.fill(text, 100) for text in (_summary(trainer), _use(trainer)))
        parts.append(f"{name}\n{textwrap.indent(facts, '  ')}\n\n{table(_own(trainer.Options))}")
    parts.append(f"Every trainer: seed, views and mixing\n\n{table(described(FrameOptions))}")
    schedule = table(described(ScheduleOptions))
    parts.append(f"Every trainer: nnU-Net's schedule (the defaults are nnU-Net's)\n\n{schedule}")
    parts.append("\nSet options in the name: -tr nnUNetTrainerCoraNet_100epochs_alpha=10\n")
    if not ablations:
        parts[-1] += "--all lists the options for ablations of the papers as well.\n"
    return "\n".join(parts)
