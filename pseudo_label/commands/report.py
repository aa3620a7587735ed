"""``pseudo_label report``: what rounds did, on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from pseudo_label.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="WORKDIR", help="the -o folder of pseudo_label rounds")


def run(args: argparse.Namespace) -> None:
    print(f"Written: {write_report(args.folder)}, and report.json next to it")
