"""nnU-Net's U-Net, run so that it also hands out features of its decoder, or with perturbed ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

# Of a network: logits, or with deep supervision those of each resolution, full resolution first.
Outputs = torch.Tensor | Sequence[torch.Tensor]


def check_is_unet(network: nn.Module) -> None:
    """Raise NotImplementedError unless ``network`` has the parts of nnU-Net's U-Nets that the functions here use."""
    decoder = getattr(network, "decoder", None)
    if not hasattr(network, "encoder") or not all(hasattr(decoder, a) for a in ("stages", "transpconvs", "seg_layers")):
        raise NotImplementedError(
            f"The network {type(network).__name__} has no encoder and decoder as nnU-Net's U-Nets have them, so no "
            "feature heads can be put on it. Use plans with PlainConvUNet or ResidualEncoderUNet, or "
            "nnUNetTrainerMeanTeacher, which runs on any network."
        )


def forward_with_features(
    unet: PlainConvUNet | ResidualEncoderUNet,
    x: torch.Tensor,
    dropout: float = 0.0,
    channel_dropout: float = 0.0,
    stage: int = -1,
) -> tuple[Outputs, torch.Tensor]:
    """What ``unet(x)`` returns, and the features that one of its segmentation layers reads.

    Args:
        unet: One that ``check_is_unet`` lets pass.
        x: (B, channels, *) input.
        dropout: Probability of dropping an element of the bottleneck features and of the last features (CoraNet,
            section IV.D, puts its Monte Carlo dropout there). 0 leaves the network as it is.
        channel_dropout: Probability of dropping a channel of a sample's features, in every skip connection and in the
            bottleneck (the feature perturbation of UniMatch, Yang et al. 2023).
        stage: The stage of the decoder whose features are returned; -1 is full resolution, 0 the lowest.

    Returns:
        The logits (a list, full resolution first, with deep supervision) and (B, F, *) features.
    """
    skips = unet.encoder(x)
    if channel_dropout:
        drop = F.dropout2d if x.ndim == 4 else F.dropout3d
        skips = [drop(skip, channel_dropout) for skip in skips]
    decoder = unet.decoder
    x = F.dropout(skips[-1], dropout) if dropout else skips[-1]
    outputs = []
    last = len(decoder.stages) - 1
    for i, (up, block, segment) in enumerate(zip(decoder.transpconvs, decoder.stages, decoder.seg_layers)):
        x = block(torch.cat((up(x), skips[-(i + 2)]), 1))
        if i == last and dropout:
            x = F.dropout(x, dropout)
        if i == stage % (last + 1):
            features = x
        if decoder.deep_supervision or i == last:
            outputs.append(segment(x))
    outputs = outputs[::-1]
    return (outputs if decoder.deep_supervision else outputs[0]), features


def full_resolution(output: Outputs) -> torch.Tensor:
    """The full-resolution logits of a network's output, with or without deep supervision."""
    return output if isinstance(output, torch.Tensor) else output[0]
