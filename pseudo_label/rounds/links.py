"""Links to images and label maps under the names that a dataset has for them."""

from __future__ import annotations

from pathlib import Path

from nnunet_semiseg.datasets import sidecar
from nnunet_semiseg.files import link


def link_images(files: list[Path], folder: Path, case: str, ending: str) -> None:
    """Link a case's channels as CASE_0000 and so on, and the file of their spacing, if they have one."""
    links = [folder / f"{case}_{channel:04d}{ending}" for channel in range(len(files))]
    spacing = sidecar(files[0], channel=True)
    if spacing.is_file():
        link(spacing, sidecar(links[0], channel=True))
    for file, target in zip(files, links):
        link(file, target)


def link_labels(file: Path, target: Path) -> None:
    """Link a label map, and the file of its spacing, if it has one."""
    spacing = sidecar(file, channel=False)
    if spacing.is_file():
        link(spacing, sidecar(target, channel=False))
    link(file, target)
