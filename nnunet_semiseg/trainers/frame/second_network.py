"""A second network for the same task, trained beside the first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_semiseg import checkpoints
from nnunet_semiseg.networks.ema import unwrap
from nnunet_semiseg.networks.second import second_plans

if TYPE_CHECKING:
    from nnunet_semiseg.trainers.frame.trainer import SemiSupervisedTrainer

# What the trainer's name gets in the name of the model folder of a second network with plans of its own.
SUFFIX = "_second"
# The second network of fold 0 is fold 100 of the same model folder.
SECOND_FOLDS = 100


def second_fold(fold: int | str) -> int:
    """The fold as which nnU-Net finds the second network of a training of ``fold``; 99 for "all"."""
    return SECOND_FOLDS - 1 if fold == "all" else SECOND_FOLDS + int(fold)


def first_fold(name: str) -> int | Literal["all"] | None:
    """The fold of the training whose first or second network lies in a folder ``fold_...``; None if it is no fold's."""
    text = name.removeprefix("fold_")
    if text == name or not (text == "all" or text.isdecimal()):
        return None
    return "all" if text in ("all", str(SECOND_FOLDS - 1)) else int(text) % SECOND_FOLDS


class SecondNetwork:
    """B beside the plans' network A; both are trained by one optimizer.

    A is what the checkpoint holds and ``nnUNetv2_predict -f 0`` runs. At the end of training, B, or its teacher if the
    teacher predicts, is written as another fold of the same model folder (``second_fold``), so that
    ``nnUNetv2_predict -f 0 100`` averages the two. With another architecture, it is a plain nnU-Net model folder of its
    own, ``<Trainer>_second__<Plans>__<Configuration>``, and ``nnUNetv2_ensemble`` averages the two.

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

    def take_pretrained_weights(self, network: nn.Module | dict[str, torch.Tensor], argument: str) -> bool:
        """Those of A, say, into B, all but the segmentation layers, as nnU-Net does with A.

        Args:
            network: Which one's, or the weights themselves.
            argument: By which the user has given them, for the log.

        Returns:
            False if B has another architecture, and is as it was.
        """
        own = self.module.state_dict()
        given = unwrap(network).state_dict() if isinstance(network, nn.Module) else network
        weights = {k: v for k, v in given.items() if ".seg_layers." not in k}
        if any(k not in own or own[k].shape != v.shape for k, v in weights.items()):
            self.trainer.print_to_log_file(
                f"WARNING: {argument} reach the first network only: the second has another architecture "
                f"(second_network={self.trainer.options.second_network})"
            )
            return False
        self.module.load_state_dict({**own, **weights})
        self.trainer.print_to_log_file(f"{argument}: both networks start from them")
        return True

    @property
    def has_own_plans(self) -> bool:
        return self.plans != self.trainer.plans_manager.plans

    @property
    def folder(self) -> Path:
        """B's fold folder."""
        fold = Path(self.trainer.output_folder)
        if not self.has_own_plans:
            return fold.with_name(f"fold_{second_fold(self.trainer.fold)}")
        name, *rest = fold.parent.name.split("__")
        return fold.parent.with_name("__".join([name + SUFFIX, *rest])) / fold.name

    def write(self) -> None:
        """B as another fold, or as a plain model folder."""
        trainer, folder = self.trainer, self.folder
        folder.mkdir(parents=True, exist_ok=True)
        if self.has_own_plans:
            model = Path(trainer.output_folder).parent
            save_json(self.plans, str(folder.parent / "plans.json"), sort_keys=False)
            for name in ("dataset.json", "dataset_fingerprint.json"):
                if (model / name).is_file():
                    shutil.copyfile(model / name, folder.parent / name)
        predicting = trainer.networks["second_teacher" if trainer.predicting() == "teacher" else "second"]
        checkpoint = checkpoints.plain(
            predicting.state_dict(), trainer.inference_allowed_mirroring_axes, trainer.configuration_name
        )
        checkpoints.write(checkpoint, folder / "checkpoint_final.pth")
        trainer.print_to_log_file(
            f"The second network is a model of its own: {folder.parent}"
            if self.has_own_plans
            else f"Both networks together: nnUNetv2_predict -f {trainer.fold} {second_fold(trainer.fold)}"
        )
