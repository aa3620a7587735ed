"""Hyper-parameters as dataclass fields, and the trainer names that set them.

``nnUNetTrainerMeanTeacher_20epochs_ema_decay=0.999`` is the Mean Teacher with two settings changed: nnU-Net knows a
trainer by nothing but its name, so the name is where a variant is written down.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar


class OptionError(ValueError):
    """An unknown option or a value that it does not take; the message lists what is valid."""


def option(
    default: Any,
    meaning: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    ablation: bool = False,
) -> Any:
    """A dataclass field that a trainer name can set.

    Args:
        default: Default value; its type is the option's type.
        meaning: One line for the table of options, with the unit.
        low, high: Inclusive range.
        choices: The values allowed, for a string.
        ablation: Whether it is there for the ablations of a paper alone; the short list leaves it out.
    """
    metadata = dict(meaning=meaning, low=low, high=high, choices=choices, ablation=ablation)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ScheduleOptions:
    """nnU-Net's own schedule attributes, settable on every trainer of this package. None keeps nnU-Net's value."""

    num_epochs: int = option(1000, "epochs; also written _<N>epochs", low=1)
    num_iterations_per_epoch: int = option(250, "training steps in an epoch", low=1)
    num_val_iterations_per_epoch: int = option(50, "validation steps in an epoch", low=1)
    initial_lr: float = option(1e-2, "initial learning rate", low=0.0)
    weight_decay: float = option(3e-5, "weight decay", low=0.0)
    oversample_foreground_percent: float = option(0.33, "labeled samples centered on foreground", low=0.0, high=1.0)
    probabilistic_oversampling: bool = option(False, "draw the oversampling per sample")
    enable_deep_supervision: bool = option(True, "loss at every decoder resolution")
    save_every: int = option(50, "epochs between two checkpoint_latest", low=1)


def described(options_class: type) -> list[dict]:
    """One row per option: name, type, default, meaning and the valid values, for tables and messages."""
    rows = []
    for field in dataclasses.fields(options_class):
        meta = field.metadata
        if meta["choices"]:
            valid = " | ".join(meta["choices"])
        elif meta["low"] is not None or meta["high"] is not None:
            valid = f"{'' if meta['low'] is None else meta['low']}..{'' if meta['high'] is None else meta['high']}"
        else:
            valid = ""
        rows.append(
            dict(
                name=field.name,
                type=type(field.default).__name__,
                default=str(field.default),
                valid=valid,
                meaning=meta["meaning"],
                ablation=meta["ablation"],
            )
        )
    return rows


def _summary(classes: Iterable[type]) -> str:
    return ", ".join(
        f"{row['name']} ({row['type']}, default {row['default']}{', ' + row['valid'] if row['valid'] else ''})"
        for options_class in classes
        for row in described(options_class)
    )


# Of the name of a file or folder, in bytes.
MAX_NAME = 255


def check_folder_name(trainer: str, plans_name: str = "p", configuration: str = "2d") -> None:
    """Raises OptionError if nnU-Net cannot make the folder of a trainer's models; by default the shortest there is."""
    excess = len(f"{trainer}__{plans_name}__{configuration}".encode()) - MAX_NAME
    if excess > 0:
        raise OptionError(
            f"The trainer's name {trainer[:60]}... is {excess} characters too long: nnU-Net makes a folder of it, of "
            f"the plans and of the configuration, and such a name has at most {MAX_NAME}. Set fewer options"
        )


_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


def _converted(field: dataclasses.Field, text: str) -> Any:
    """``text`` as the field's type; raises OptionError outside its range or choices."""
    kind: Callable[[str], Any] = type(field.default)
    try:
        value = _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise OptionError(f"{field.name}={text} is not of type {type(field.default).__name__}") from None
    low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
    if choices and value not in choices:
        raise OptionError(f"{field.name}={text} is not one of {', '.join(choices)}")
    # "not (a <= b)" also refuses nan.
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise OptionError(f"{field.name}={text} is outside {low}..{'' if high is None else high}")
    if kind is float and value in (float("inf"), float("-inf")):
        raise OptionError(f"{field.name}={text} is not finite")
    return value


SETTING = re.compile(r"_(?:(?P<epochs>\d+)epochs|(?P<name>[A-Za-z]\w*?)=(?P<value>.+?))(?=_\d+epochs|_[A-Za-z]\w*=|$)")


def parse_suffix(suffix: str, options_class: type) -> tuple[dict, dict]:
    """Read the part of a trainer's name that follows the class name.

    Args:
        suffix: ``""`` or ``_<N>epochs`` and ``_<option>=<value>``, in any order.
        options_class: The method's options.

    Returns:
        The method's options and the schedule attributes that the name sets, each {name: typed value}.

    Raises:
        OptionError: for anything in the suffix that is not a setting, with the valid ones.
    """
    method: dict[str, Any] = {}
    schedule: dict[str, Any] = {}
    position = 0
    try:
        while position < len(suffix):
            match = SETTING.match(suffix, position)
            if match is None:
                raise OptionError(f"cannot read '{suffix[position:]}'; write _<N>epochs or _<option>=<value>")
            position = match.end()
            if match["epochs"]:
                name, text = "num_epochs", match["epochs"]
            else:
                name, text = match["name"], match["value"]
            for target, fields in ((method, options_class), (schedule, ScheduleOptions)):
                field = {field.name: field for field in dataclasses.fields(fields)}.get(name)
                if field is not None:
                    if name in target:
                        raise OptionError(f"{name} is given twice")
                    target[name] = _converted(field, text)
                    break
            else:
                raise OptionError(f"there is no option '{name}'")
    except OptionError as error:
        raise OptionError(f"{error}. Options: {_summary((options_class, ScheduleOptions))}") from None
    return method, schedule


Options = TypeVar("Options")


def build_options(options_class: type[Options], chosen: Mapping[str, Any]) -> Options:
    """An ``options_class``: its defaults, changed by the chosen preset, changed by what is chosen by name."""
    presets = getattr(options_class, "PRESETS", {})
    preset = presets.get(chosen.get("preset"), {})
    return options_class(**{**preset, **chosen})
