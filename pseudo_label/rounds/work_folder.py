"""Where rounds keep what they make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RoundFolder:
    """``round_N`` of a work folder."""

    path: Path

    @property
    def images(self) -> Path:
        """Links to the images that are predicted."""
        return self.path / "images"

    def predictions(self, member: str) -> Path:
        return self.path / "members" / member

    @property
    def scores(self) -> Path:
        """As ``pseudo_label score`` leaves them."""
        return self.path / "scores"

    @property
    def selection(self) -> Path:
        """As ``pseudo_label select`` leaves it."""
        return self.path / "selection"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def log(self, job: str) -> Path:
        return self.logs / f"{job}.log"


@dataclass(frozen=True)
class WorkFolder:
    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def labeled(self) -> Path:
        """Links to the label maps of the training cases."""
        return self.path / "labeled"

    def round(self, number: int) -> RoundFolder:
        return RoundFolder(self.path / f"round_{number}")
