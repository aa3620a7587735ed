"""One training of a benchmark: what it left in its folder, and what the benchmark remembers of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_semiseg.files import read_json, read_table, write_json

RECORD, SNAPSHOTS, QUALITY = "benchmark.json", "snapshots", "pseudo_label_quality.csv"
QUALITY_COLUMNS = ["epoch", "network", "class", "dice"]


def read_if_whole(file: Path) -> dict | None:
    """The content, or None if the file is missing or cut off."""
    with suppress(FileNotFoundError, ValueError):
        return read_json(file)
    return None


def update_record(fold: Path, **values: Any) -> dict:
    """Change what the benchmark remembers of a run, in a file beside run.log."""
    record = {**(read_if_whole(fold / RECORD) or {}), **values}
    write_json(fold / RECORD, record)
    return record


def read_quality(fold: Path) -> list[tuple[int, str, str, float]]:
    """Epoch, network, class and Dice."""
    if not (fold / QUALITY).is_file():
        return []
    rows = read_table(fold / QUALITY, QUALITY_COLUMNS, "Remove it")
    return [(int(row["epoch"]), row["network"], row["class"], float(row["dice"])) for row in rows]


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        method: As FILE.json calls it.
        trainer: Name for ``nnUNetv2_train -tr``.
        budget: As FILE.json calls it.
        number: nnU-Net's fold.
        fold: Its folder in nnUNet_results.
        base: The run whose network it starts from; None: it starts untrained.
        shared_epochs: Those of ``base``.
    """

    method: str
    trainer: str
    budget: str
    number: int
    seed: int
    fold: Path
    base: Run | None = None
    shared_epochs: int = 0

    def __str__(self) -> str:
        return f"{self.method}, {self.budget}, seed {self.seed}"

    @property
    def record(self) -> dict:
        return read_if_whole(self.fold / RECORD) or {}

    @property
    def fork(self) -> str | None:
        """What the record says of the network that it starts from."""
        return None if self.base is None else self.base.trainer

    @property
    def summary(self) -> dict | None:
        """nnU-Net's validation of whole cases, once it is there."""
        return read_if_whole(self.fold / "validation" / "summary.json")

    @property
    def started(self) -> bool:
        return any(self.fold.glob("checkpoint_*.pth"))

    def reached(self) -> dict[str, int]:
        """What a call that continues can stand on: files and when they were written."""
        files = [*self.fold.glob("checkpoint_*.pth"), *self.fold.glob("validation/summary.json"), self.fold / QUALITY]
        return {file.name: file.stat().st_mtime_ns for file in files if file.is_file()}

    @property
    def done(self) -> bool:
        return self.summary is not None and "training_minutes" in self.record

    @property
    def mean(self) -> float:
        """Mean Dice over the foreground classes, of a run with a summary."""
        summary = self.summary
        assert summary is not None
        return summary["foreground_mean"]["Dice"]

    @property
    def peak_gib(self) -> float | None:
        """On CUDA what the trainer logs, on the CPU the resident memory of the training process."""
        return self.record.get("peak_gpu_gib" if self.record.get("device") == "cuda" else "peak_rss_gib")
