"""A second network for the same plans, of the same or of the other of nnU-Net's two architectures."""

from __future__ import annotations

import copy

_PACKAGE = "dynamic_network_architectures.architectures.unet."
PLAIN, RESIDUAL = _PACKAGE + "PlainConvUNet", _PACKAGE + "ResidualEncoderUNet"
# nnU-Net's residual encoder planner.
_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6)


def second_plans(plans: dict, configuration: str, architecture: str) -> dict:
    """The plans with another architecture in one configuration; everything else as it is.

    Args:
        plans: Content of a plans file.
        configuration: The configuration to change.
        architecture: "same"; or "plain" (PlainConvUNet), "resenc" (ResidualEncoderUNet) or "other" (that of the two
            which the plans' own network is not), with its features, kernels and strides and nnU-Net's usual number of
            convolutions or blocks per stage.

    Raises:
        NotImplementedError: if the plans' network is neither of the two, so that the other cannot be derived from it.
    """
    plans = copy.deepcopy(plans)
    if architecture == "same":
        return plans
    described = _architecture(plans, configuration)
    name, arguments = described["network_class_name"], described["arch_kwargs"]
    if name not in (PLAIN, RESIDUAL):
        raise NotImplementedError(
            f"The plans' network is {name}; a second network of another architecture can only be made for "
            "PlainConvUNet and ResidualEncoderUNet. Use second_network=same"
        )
    wanted = {"plain": PLAIN, "resenc": RESIDUAL, "other": RESIDUAL if name == PLAIN else PLAIN}[architecture]
    if wanted != name:
        stages = arguments["n_stages"]
        for key in ("n_conv_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"):
            arguments.pop(key, None)
        if wanted == RESIDUAL:
            arguments |= {"n_blocks_per_stage": list(_BLOCKS[:stages]), "n_conv_per_stage_decoder": [1] * (stages - 1)}
        else:
            arguments |= {"n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
        described["network_class_name"] = wanted
    return plans


def _architecture(plans: dict, configuration: str) -> dict:
    """Where the configuration's architecture stands, through configurations that inherit."""
    description = plans["configurations"][configuration]
    if "architecture" not in description:
        description["architecture"] = copy.deepcopy(_architecture(plans, description["inherits_from"]))
    return description["architecture"]
