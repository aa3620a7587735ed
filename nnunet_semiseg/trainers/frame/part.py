"""What the type checker has to know of the trainer that a part of the frame is put together with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from torch import nn

    from nnunet_semiseg.data.randomness import RandomStream
    from nnunet_semiseg.labels import LabelAdapter
    from nnunet_semiseg.trainers.frame.schedule import Schedule
    from nnunet_semiseg.trainers.frame.second_network import SecondNetwork

    class Part(nnUNetTrainer):
        """A mixin in front of nnU-Net's trainer, whose attributes it uses and whose methods it calls by ``super()``.

        Declared here is what the parts of the frame share. nnU-Net has no types: what is declared neither here nor in
        the part itself may be nnU-Net's, and is not checked.
        """

        # Each method states the class of its own.
        options: Any
        network: Any
        labels: LabelAdapter
        companions: nn.ModuleDict
        companion_optimizers: dict[str, torch.optim.Optimizer]
        # The second student as it is run, and all there is of it.
        second: Any
        _second: SecondNetwork
        schedule: Schedule
        random_stream: RandomStream
        global_step: int
        trained_on: set[str]
        absent_classes: set[str]
        foreground_locations: dict[str, dict[int, np.ndarray]]
        # nnU-Net's own.
        _best_ema: float | None
        batch_size: int
        _epoch_sums: dict[str, list[float]]
        _step_monitors: dict[str, torch.Tensor]
        _unlabeled_keys: list[str]
        _non_finite_in_a_row: int
        _non_finite_total: int

else:
    Part = object
