"""The ids and names of the rounds' datasets, which no other work folder may take."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

# A symbolic link in nnUNet_raw to the work folder whose round has the id and has not built its dataset yet: made with
# its content in one step.
_MARK = ".rounds_of_dataset_"


def name_of_round(first: str, number: int, own_id: int) -> str:
    """``Dataset502_Name_round1`` of the dataset of round 0, ``Dataset501_Name``."""
    return f"Dataset{own_id:03d}_{first.partition('_')[2]}_round{number}"


def check_ids(ids: Sequence[int], rounds: int, begun: Sequence[str], owner: Path) -> None:
    """Raises ValueError if the ids are not one for each round, or one cannot be used.

    Args:
        begun: Names of the datasets of the rounds from 1 on that have begun.
        owner: The work folder.
    """
    if not ids:
        return
    own = [convert_dataset_name_to_id(name) for name in begun]
    if len(ids) != rounds:
        raise ValueError(f"{len(ids)} dataset ids for {rounds} rounds. Give one for each")
    if len(set(ids)) < len(ids) or not all(0 < number < 1000 for number in ids):
        raise ValueError(f"The dataset ids {' '.join(map(str, ids))} are not different numbers from 1 to 999")
    if list(ids[: len(own)]) != own:
        raise ValueError(
            f"The first rounds have the dataset ids {' '.join(map(str, own))}. Give these, and then new ones"
        )
    taken = sorted(set(ids[len(own) :]) & used_ids(owner))
    if taken:
        raise ValueError(f"The dataset id {taken[0]} is taken. Use another one, or leave --dataset-ids out")


def take_name(first: str, number: int, ids: Sequence[int], owner: Path) -> str:
    """The name of a round's dataset, whose id no other rounds can take until the dataset is there.

    Raises:
        ValueError: if there is no free id, or the given one is taken.
    """
    while True:
        own = ids[number - 1] if ids else free_ids(convert_dataset_name_to_id(first) + 1, 1, owner)[0]
        if reserve_id(own, owner):
            return name_of_round(first, number, own)
        if ids:
            raise ValueError(f"The dataset id {own} is taken by other rounds. Use another one")


def planned_names(first: str, begun: Sequence[str], rounds: int, ids: Sequence[int], owner: Path) -> list[str]:
    """The names of the datasets of all rounds from 1 on; those that have not begun get ids that are free now."""
    if ids:
        chosen = ids[len(begun) :]
    else:
        # The folder's own marks do not count as used.
        own = set(map(convert_dataset_name_to_id, begun))
        chosen = [i for i in free_ids(convert_dataset_name_to_id(first) + 1, rounds, owner) if i not in own]
    numbers = range(len(begun) + 1, rounds + 1)
    return [*begun, *(name_of_round(first, number, own_id) for number, own_id in zip(numbers, chosen))]


def free_ids(first: int, number: int, owner: Path) -> list[int]:
    """The lowest dataset ids from ``first`` on that no folder of nnU-Net uses, and no other work folder will."""
    used = used_ids(owner)
    free = [i for i in range(first, 1000) if i not in used]
    if len(free) < number:
        raise ValueError(f"There are not {number} free dataset ids from {first} to 999. Choose some with --dataset-ids")
    return free[:number]


def used_ids(owner: Path) -> set[int]:
    """Dataset ids that have a folder, or that a work folder other than ``owner`` has reserved."""
    used = {
        convert_dataset_name_to_id(folder.name)
        for variable in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results)
        if variable.is_set()
        for folder in Path(str(variable)).glob("Dataset[0-9][0-9][0-9]_*")
    }
    marks = Path(str(nnUNet_raw)).glob(f"{_MARK}[0-9][0-9][0-9]")
    return used | {int(mark.name[-3:]) for mark in marks if _other_owner(mark, owner)}


def reserve_id(number: int, owner: Path) -> bool:
    """Keep a dataset id for a work folder; False if another one was faster."""
    mark = _mark(number)
    if not _other_owner(mark, owner):
        with suppress(FileNotFoundError):
            if Path(os.readlink(mark)) == owner:
                return True
            mark.unlink()
        with suppress(FileExistsError):
            mark.symlink_to(owner)
            return True
    return False


def release_id(number: int) -> None:
    """The dataset is there: its folder holds the id."""
    _mark(number).unlink(missing_ok=True)


def _mark(number: int) -> Path:
    return Path(str(nnUNet_raw)) / f"{_MARK}{number:03d}"


def _other_owner(mark: Path, owner: Path) -> bool:
    """Whether the mark is that of another work folder, which still exists."""
    with suppress(FileNotFoundError):
        return Path(os.readlink(mark)) != owner and mark.exists()
    return False
