"""Training of the members, and their validation Dice."""

from __future__ import annotations

from pathlib import Path

from nnunetv2.utilities.file_path_utilities import get_output_folder

from nnunet_semiseg import checkpoints
from nnunet_semiseg.data.splits import check_trained_on
from nnunet_semiseg.files import read_json
from nnunet_semiseg.jobs import Job, end_of
from nnunet_semiseg.trainers.registry import find_trainer
from pseudo_label.rounds import command_lines
from pseudo_label.rounds.round import Round
from pseudo_label.rounds.settings import Member


def train_first(current: Round) -> dict:
    """Round 0: models that are there are used."""
    return {"reused": _already_trained(current), **train(current)}


def train(current: Round) -> dict:
    """Train the members that are not trained; {"validation": {member: mean validation Dice on its fold}}.

    Raises:
        RuntimeError: with the end of the log, if a training leaves no validation.
    """
    members = current.setup.members
    waiting = [member for member in members if _validation(current, member) is None]
    if current.setup.settings.finetune and current.number > 0:
        for member in waiting:
            _start_from_round_before(current, member)
    current.run([_job(current, member) for member in waiting])
    found = {member.name: _validation(current, member) for member in members}
    for member in members:
        if found[member.name] is None:
            raise RuntimeError(
                f"The training of {member.name} left no {_summary(current, member)}. "
                f"{end_of(_job(current, member).log)}"
            )
    return {"validation": found}


def _already_trained(current: Round) -> list[str]:
    """The members whose models of round 0 are not of these rounds.

    Raises:
        ValueError: if one was validated on other cases than its fold has, or trained on labels that it now hides.
    """
    first, folds = current.setup.first, current.setup.cases.folds
    found = []
    for member in current.setup.members:
        fold, file = _fold_folder(current, member), _summary(current, member)
        if _validation(current, member) is None or _job(current, member).log.is_file():
            continue
        cure = f"Move {fold} away, and the member is trained"
        cases = {Path(of["reference_file"]).name for of in read_json(file)["metric_per_case"]}
        if cases != {f"{case}{first.file_ending}" for case in folds[member.fold]["val"]}:
            raise ValueError(f"{file} is of other validation cases than fold {member.fold} has. {cure}")
        if find_trainer(member.trainer) is not None:
            checkpoint = fold / "checkpoint_final.pth"
            state = checkpoints.read(checkpoint).get(checkpoints.STATE_KEY, {})
            check_trained_on(first.splits_file, member.fold, state.get("trained_on", ()), checkpoint, cure)
        print(f"{member.name} is trained already, and is used as it is: {fold}")
        found.append(member.name)
    return found


def _start_from_round_before(current: Round, member: Member) -> None:
    """Put a checkpoint there with which ``--c`` starts, unless the training has its own already."""
    fold = _fold_folder(current, member)
    if not any(fold.glob("checkpoint_*.pth")):
        fold.mkdir(parents=True, exist_ok=True)
        before = checkpoints.read(_fold_folder(current.before, member) / "checkpoint_final.pth")
        checkpoints.write(checkpoints.restarted(before), fold / "checkpoint_latest.pth")


def _validation(current: Round, member: Member) -> float | None:
    """Mean Dice over the classes that the validation cases have; None while the training is not finished.

    Raises:
        ValueError: if the validation cases have no class at all.
    """
    try:
        # nnU-Net's own mean over classes is NaN if one is in no validation case.
        of_classes = read_json(_summary(current, member))["mean"].values()
    except (FileNotFoundError, ValueError):
        # A kill cuts it off; --c makes it anew.
        return None
    dice = [of["Dice"] for of in of_classes if of["n_ref"] > 0]
    if not dice:
        raise ValueError(f"The validation cases of fold {member.fold} have no foreground, so no round can be judged")
    return sum(dice) / len(dice)


def _job(current: Round, member: Member) -> Job:
    return command_lines.training(current.setup, current.number, current.dataset, member)


def _fold_folder(current: Round, member: Member) -> Path:
    s = current.setup.settings
    return Path(get_output_folder(current.dataset, member.trainer, s.plans, s.configuration, member.fold))


def _summary(current: Round, member: Member) -> Path:
    """nnU-Net's validation, which it writes at the very end of a training."""
    return _fold_folder(current, member) / "validation" / "summary.json"
