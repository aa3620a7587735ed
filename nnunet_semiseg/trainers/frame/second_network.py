"""A second network for the same task, trained beside the first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_semiseg import checkpoints
from nnunet_semiseg.networks.ema import unwrap
from nnunet_semiseg.networks.second import second_plans

if TYPE_CHECKING:
    from nnunet_semiseg.trainers.frame.trainer import SemiSupervisedTrainer

# What the trainer's name gets in the name of the second network's model folder.
SUFFIX = "_second"


class SecondNetwork:
    """B beside the plans' network A; both are trained by one optimizer.

    A is what the checkpoint holds and ``nnUNetv2_predict`` runs. At the end of training, B is written as a plain
    nnU-Net model folder of its own, ``<Trainer>_second__<Plans>__<Configuration>``, so that
    ``nnUNetv2_predict -tr <Trainer>_second`` runs B and ``nnUNetv2_ensemble`` averages the two.

    Args:
        trainer: Whose options name B's architecture; B is initialized by nnU-Net with other random numbers than A.
    """

    def __init__(self, trainer: SemiSupervisedTrainer):
        self.trainer = trainer
        self.plans = second_plans(
            trainer.plans_manager.plans, trainer.configuration_name, trainer.options.second_network
        )
        plans = PlansManager(self.plans)
        self.module: nn.Module = trainer.build_network_architecture(
            plans,
            plans.get_configuration(trainer.configuration_name),
            trainer.num_input_channels,
            trainer.label_manager.num_segmentation_heads,
            trainer.enable_deep_supervision,
        ).to(trainer.device)

    def take_pretrained_weights(self, network: nn.Module) -> None:
        """Those of A into B, all but the segmentation layers, as nnU-Net does with A."""
        own = self.module.state_dict()
        weights = {k: v for k, v in unwrap(network).state_dict().items() if ".seg_layers." not in k}
        if any(k not in own or own[k].shape != v.shape for k, v in weights.items()):
            self.trainer.print_to_log_file(
                "WARNING: -pretrained_weights reach the first network only: the second has another architecture "
                f"(second_network={self.trainer.options.second_network})"
            )
            return
        self.module.load_state_dict({**own, **weights})
        self.trainer.print_to_log_file("-pretrained_weights: both networks start from them")

    @property
    def folder(self) -> Path:
        """B's fold folder."""
        fold = Path(self.trainer.output_folder)
        name, *rest = fold.parent.name.split("__")
        return fold.parent.with_name("__".join([name + SUFFIX, *rest])) / fold.name

    def write(self) -> None:
        """B as a plain model folder."""
        trainer, folder = self.trainer, self.folder
        folder.mkdir(parents=True, exist_ok=True)
        model = Path(trainer.output_folder).parent
        save_json(self.plans, str(folder.parent / "plans.json"), sort_keys=False)
        for name in ("dataset.json", "dataset_fingerprint.json"):
            if (model / name).is_file():
                shutil.copyfile(model / name, folder.parent / name)
        checkpoint = checkpoints.plain(
            self.module.state_dict(), trainer.inference_allowed_mirroring_axes, trainer.configuration_name
        )
        checkpoints.write(checkpoint, folder / "checkpoint_final.pth")
        trainer.print_to_log_file(f"The second network is a model of its own: {folder.parent}")
