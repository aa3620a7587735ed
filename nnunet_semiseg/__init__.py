"""Semi-supervised segmentation on top of nnU-Net v2.

This module is imported at every start of the interpreter (by ``nnunet_semiseg.pth``), so it imports nothing but ``os``.
"""

import os

__version__ = "0.1.0"

DISCOVERY_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_discovery")


def extend_trainer_search() -> None:
    """Append this package's trainers to ``nnUNet_extTrainer``, the variable that nnU-Net searches for custom trainers.

    A value that the user has set is kept and stays in front; calling twice changes nothing.
    """
    folders = [folder for folder in os.environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder]
    if DISCOVERY_FOLDER not in folders and os.path.isdir(DISCOVERY_FOLDER):
        os.environ["nnUNet_extTrainer"] = os.pathsep.join([*folders, DISCOVERY_FOLDER])
