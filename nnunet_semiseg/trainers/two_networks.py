"""Two networks for the same task, trained at the same time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_semiseg import checkpoints
from nnunet_semiseg.networks.ema import unwrap
from nnunet_semiseg.networks.second import second_plans
from nnunet_semiseg.trainers.base import SemiSupervisedTrainer
from nnunet_semiseg.trainers.options import option


def second_network_option(default: str):
    return option(
        default,
        "architecture of the second network: the plans' own, or a plain or residual encoder U-Net; other: the one of "
        "these that the plans' own is not",
        choices=("same", "resenc", "plain", "other"),
    )


@dataclass(frozen=True)
class SecondNetworkOptions:
    second_network: str = second_network_option("same")


class TwoNetworkTrainer(SemiSupervisedTrainer):
    """The frame of methods with a second network B beside the plans' network A, trained by the same optimizer.

    A is what the checkpoint holds and ``nnUNetv2_predict`` runs. At the end of training, B is written as a plain
    nnU-Net model folder of its own, ``<Trainer>_second__<Plans>__<Configuration>``, so that
    ``nnUNetv2_predict -tr <Trainer>_second`` runs B and ``nnUNetv2_ensemble`` averages the two.
    """

    SECOND_FOLDER = "_second"
    options: SecondNetworkOptions

    def build_second(self) -> nn.Module:
        """B, initialized by nnU-Net with other random numbers than A."""
        self.second_plans = second_plans(self.plans_manager.plans, self.configuration_name, self.options.second_network)
        plans = PlansManager(self.second_plans)
        network = self.build_network_architecture(
            plans,
            plans.get_configuration(self.configuration_name),
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        self.second = self.compiled(network)
        return network

    def build_companions(self):
        return {"second": self.build_second()}

    @property
    def trained_networks(self):
        return self.student, self.second

    def take_pretrained_weights(self):
        """Into B as well, all but the segmentation layers, as nnU-Net does with A."""
        super().take_pretrained_weights()
        second = self.companions["second"].state_dict()
        weights = {k: v for k, v in unwrap(self.network).state_dict().items() if ".seg_layers." not in k}
        if any(k not in second or second[k].shape != v.shape for k, v in weights.items()):
            self.print_to_log_file(
                "WARNING: -pretrained_weights reach the first network only: the second has another architecture "
                f"(second_network={self.options.second_network})"
            )
            return
        self.companions["second"].load_state_dict({**second, **weights})
        self.print_to_log_file("-pretrained_weights: both networks start from them")

    def writes_second(self) -> bool:
        """False for a setting of the method in which only one of the networks learns."""
        return True

    @property
    def second_folder(self) -> Path:
        """B's fold folder."""
        model = Path(self.output_folder).parent
        trainer, *rest = model.name.split("__")
        return model.with_name("__".join([trainer + self.SECOND_FOLDER, *rest])) / Path(self.output_folder).name

    def on_train_end(self):
        super().on_train_end()
        if self.local_rank == 0 and not self.disable_checkpointing and self.writes_second():
            self.write_second()

    def write_second(self) -> None:
        """B as a plain model folder."""
        folder = self.second_folder
        folder.mkdir(parents=True, exist_ok=True)
        model = Path(self.output_folder).parent
        save_json(self.second_plans, str(folder.parent / "plans.json"), sort_keys=False)
        for name in ("dataset.json", "dataset_fingerprint.json"):
            if (model / name).is_file():
                shutil.copyfile(model / name, folder.parent / name)
        checkpoint = checkpoints.plain(
            self.companions["second"].state_dict(), self.inference_allowed_mirroring_axes, self.configuration_name
        )
        checkpoints.write(checkpoint, folder / "checkpoint_final.pth")
        self.print_to_log_file(f"The second network is a model of its own: {folder.parent}")
