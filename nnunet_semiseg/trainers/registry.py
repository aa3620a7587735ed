"""Which trainers exist, and how a name becomes a class."""

from __future__ import annotations

import copyreg
import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable

import nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_semiseg.trainers import methods
from nnunet_semiseg.trainers.frame import SemiSupervisedTrainer
from nnunet_semiseg.trainers.frame.settings import SettingsFromName
from nnunet_semiseg.trainers.options import SETTING, check_folder_name, parse_suffix


def _methods() -> dict[str, type[SemiSupervisedTrainer]]:
    """{name: class} of every ``nnUNetTrainer...`` that a file in ``methods`` defines, in the order of their papers."""
    found: list[type[SemiSupervisedTrainer]] = []
    for file in pkgutil.iter_modules(methods.__path__):
        module = importlib.import_module(f"{methods.__name__}.{file.name}")
        found += [
            trainer
            for name, trainer in inspect.getmembers(module, inspect.isclass)
            if name.startswith("nnUNetTrainer")
            and trainer.__module__ == module.__name__
            and issubclass(trainer, SemiSupervisedTrainer)
        ]
    return {
        trainer.__name__: trainer
        for trainer in sorted(found, key=lambda t: (t.paper.year if t.paper else 0, t.__name__))
    }


TRAINERS: dict[str, type[SemiSupervisedTrainer]] = _methods()

_found: dict[str, type[SettingsFromName]] = {}


class _Variant(type):
    """The type of classes made from a name with options; pickled as that name, which stands in no module."""


def _by_name(variant: _Variant) -> tuple[Callable, tuple[str]]:
    return find_trainer, (variant.__name__,)


copyreg.pickle(_Variant, _by_name)


def find_trainer(name: str) -> type[SettingsFromName] | None:
    """The trainer class of that name; the same object whenever it is asked for.

    Args:
        name: ``<Trainer>[_<N>epochs][_<option>=<value>]...``

    Returns:
        The class, or None if no trainer of this package has such a name.

    Raises:
        OptionError: if the trainer exists and the rest of the name is not a valid setting of it, or is too long.
    """
    if name not in _found:
        base, suffix = _base_of(name)
        if base is None:
            return None
        check_folder_name(name)
        _found[name] = _variant(name, base, suffix) if suffix else base
    return _found[name]


def _base_of(name: str) -> tuple[type | None, str]:
    """The class whose variant a name is, and the settings in the name.

    A trainer that is not of this package is looked up as nnU-Net does, but only for a name with settings that nnU-Net
    itself has not (it has a nnUNetTrainer_20epochs).
    """
    known = max((base for base in TRAINERS if name == base or name.startswith(base + "_")), key=len, default="")
    if known:
        return TRAINERS[known], name[len(known) :]
    setting = SETTING.search(name)
    if setting is None or _is_nnunets(name):
        return None, ""
    try:
        return recursive_find_trainer_class_by_name(name[: setting.start()]), name[setting.start() :]
    except RuntimeError:
        return None, ""


def _is_nnunets(name: str) -> bool:
    folder = os.path.join(nnunetv2.__path__[0], "training", "nnUNetTrainer")
    package = "nnunetv2.training.nnUNetTrainer"
    return recursive_find_python_class(folder, name, package, nnunetv2.__path__[0]) is not None


def _variant(name: str, base: type, suffix: str) -> type:
    # A trainer that knows nothing of settings gets nnU-Net's schedule and a seed.
    bases = (base,) if issubclass(base, SettingsFromName) else (SettingsFromName, base)
    options = bases[0].Options
    chosen, schedule = parse_suffix(suffix, options)
    return _Variant(
        name,
        bases,
        {
            "__module__": base.__module__,
            "__doc__": base.__doc__,
            "chosen_options": {**bases[0].chosen_options, **chosen},
            "chosen_schedule": {**bases[0].chosen_schedule, **schedule},
        },
    )
