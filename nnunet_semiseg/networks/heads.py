"""Small convolutional heads on a U-Net's last features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

if TYPE_CHECKING:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet


class FeatureHead(nn.Sequential):
    """Two 3^d convolution blocks and a 1x1 convolution (CoraNet, section IV.A).

    Args:
        unet: The U-Net the head reads; gives dimension, kernel size, norm and nonlinearity.
        num_outputs: Output channels.
    """

    def __init__(self, unet: PlainConvUNet | ResidualEncoderUNet, num_outputs: int):
        encoder = unet.encoder
        features = encoder.output_channels[0]
        # A quarter of the features: two heads of full width would add half of the U-Net's own cost.
        width = max(8, features // 4)
        block: dict[str, Any] = dict(
            conv_op=encoder.conv_op,
            output_channels=width,
            kernel_size=encoder.kernel_sizes[0],
            stride=1,
            conv_bias=encoder.conv_bias,
            norm_op=encoder.norm_op,
            norm_op_kwargs=encoder.norm_op_kwargs,
            nonlin=encoder.nonlin,
            nonlin_kwargs=encoder.nonlin_kwargs,
        )
        super().__init__(
            ConvDropoutNormReLU(input_channels=features, **block),
            ConvDropoutNormReLU(input_channels=width, **block),
            encoder.conv_op(width, num_outputs, 1),
        )
        self.apply(InitWeights_He(1e-2))
