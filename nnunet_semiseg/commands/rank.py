"""``nnunet_semiseg rank``: teams ranked as the FLARE22 challenge ranks them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from nnunet_semiseg.commands.compare import names_of
from nnunet_semiseg.evaluation.flare import MEASURES, rank, read_team
from nnunet_semiseg.files import write_csv
from nnunet_semiseg.markdown import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="TEAM",
        help="two or more folders, each with a table of scores (*DSC_NSD*.csv, of evaluate --preset or the challenge) "
        "and one of measurements (*efficiency*.csv, of measure or the challenge)",
    )
    parser.add_argument("--names", nargs="+", metavar="NAME", help="of the teams (default: what differs in TEAMs)")
    parser.add_argument(
        "--weights",
        nargs=len(MEASURES),
        type=float,
        default=[weight for weight, _ in MEASURES.values()],
        metavar=("DSC", "NSD", "TIME", "GPU", "CPU"),
        help="of the ranks (default: those of FLARE22, 1 1 1 0.5 0.5)",
    )
    parser.add_argument("-o", metavar="OUT", default=".", help="folder for ranking.csv (default .)")


def run(args: argparse.Namespace) -> None:
    folders = [Path(folder) for folder in args.folders]
    names = names_of(folders, args.names, "TEAM")
    weights = np.array(args.weights)
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError("--weights are numbers of 0 or more, not all of them 0")
    teams = [read_team(folder) for folder in folders]
    cases = sorted(teams[0])
    for folder, team in zip(folders, teams):
        for case in sorted(set(cases) ^ set(team)):
            has, lacks = (folder, folders[0]) if case in team else (folders[0], folder)
            raise ValueError(f"{lacks} has no case {case}, which {has} has. Rank teams on the same cases")
    values = np.array([[list(team[case].values()) for case in cases] for team in teams])
    measures = list(MEASURES)
    unknown = np.isnan(values).any(axis=1)  # of each team and measure
    for column in np.flatnonzero(unknown.any(axis=0)):
        if not unknown[:, column].all():
            raise ValueError(
                f"{folders[int(unknown[:, column].argmax())]} has no {measures[column]} of some cases, but "
                f"{folders[int(unknown[:, column].argmin())]} has. Measure both on a machine with a GPU"
            )
    kept = ~unknown.any(axis=0)
    if not (weights[kept] > 0).any():
        raise ValueError("No measure is left to rank by: a measure without values has all of the weight")
    better = np.array([more for _, more in MEASURES.values()])
    of_measures, score = rank(values[..., kept], weights[kept], better[kept])
    # Sums in another order differ in their last digits.
    score = np.round(score, 9)
    places = rankdata(score, method="min").astype(int)
    shown = [measure for measure, keep in zip(measures, kept) if keep]
    rows = [
        [places[i], names[i], score[i], *of_measures[i], *values[i].mean(axis=0)[kept]]
        for i in np.argsort(score, kind="stable")
    ]
    file = Path(args.o) / "ranking.csv"
    write_csv(file, ["place", "team", "rank", *(f"rank_{m}" for m in shown), *(f"mean_{m}" for m in shown)], rows)
    print(
        table(
            ["place", "team", "rank", *shown],
            [[str(r[0]), r[1], *(f"{v:.3f}" for v in r[2 : 3 + len(shown)])] for r in rows],
        )
    )
    used = ", ".join(f"{m} {w:g}" for m, w in zip(shown, weights[kept]))
    print(f"\nMean ranks over {len(cases)} cases, of {len(names)} teams; 1 is the best. Weights: {used}.")
    if not kept.all():
        left = ", ".join(measure for measure, keep in zip(measures, kept) if not keep)
        print(f"{left} was measured for no team and is left out.")
    print(f"\nWritten to {file}")
