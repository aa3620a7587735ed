"""Which trainers exist, and how a name becomes a class."""

from __future__ import annotations

import copyreg
import importlib

from nnunet_semiseg.trainers.options import check_folder_name, parse_suffix

# Class name -> module. A method is added by its file and one line here.
TRAINERS = {
    "nnUNetTrainerMeanTeacher": "nnunet_semiseg.trainers.mean_teacher",
    "nnUNetTrainerCoraNet": "nnunet_semiseg.trainers.coranet",
    "nnUNetTrainerUAMT": "nnunet_semiseg.trainers.uamt",
    "nnUNetTrainerEntropyMinimization": "nnunet_semiseg.trainers.entropy_minimization",
    "nnUNetTrainerPiModel": "nnunet_semiseg.trainers.pi_model",
    "nnUNetTrainerBCP": "nnunet_semiseg.trainers.bcp",
    "nnUNetTrainerMeanTeacherBURL": "nnunet_semiseg.trainers.mean_teacher_burl",
    "nnUNetTrainerBCPBURL": "nnunet_semiseg.trainers.bcp_burl",
    "nnUNetTrainerCPS": "nnunet_semiseg.trainers.cps",
    "nnUNetTrainerDTML": "nnunet_semiseg.trainers.dtml",
    "nnUNetTrainerDTC": "nnunet_semiseg.trainers.dtc",
    "nnUNetTrainerDualStream": "nnunet_semiseg.trainers.dual_stream",
}

_found: dict[str, type] = {}


class _Variant(type):
    """The type of classes made from a name with options; pickled as that name, which stands in no module."""


copyreg.pickle(_Variant, lambda variant: (find_trainer, (variant.__name__,)))


def trainer_classes() -> dict[str, type]:
    """All trainers of this package by class name."""
    return {name: getattr(importlib.import_module(module), name) for name, module in TRAINERS.items()}


def find_trainer(name: str) -> type | None:
    """The trainer class of that name; the same object whenever it is asked for.

    Args:
        name: ``<Trainer>[_<N>epochs][_<option>=<value>]...``

    Returns:
        The class, or None if no trainer of this package has such a name.

    Raises:
        OptionError: if the trainer exists and the rest of the name is not a valid setting of it, or is too long.
    """
    if name not in _found:
        base_name = max((base for base in TRAINERS if name == base or name.startswith(base + "_")), key=len, default="")
        if not base_name:
            return None
        check_folder_name(name)
        base = getattr(importlib.import_module(TRAINERS[base_name]), base_name)
        if name == base_name:
            _found[name] = base
        else:
            chosen, schedule = parse_suffix(name[len(base_name) :], base.Options)
            _found[name] = _Variant(
                name,
                (base,),
                {
                    "__module__": base.__module__,
                    "__doc__": base.__doc__,
                    "chosen_options": {**base.chosen_options, **chosen},
                    "chosen_schedule": {**base.chosen_schedule, **schedule},
                },
            )
    return _found[name]
