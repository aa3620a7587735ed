"""The module in which the classes made from a name live, so that pickle finds them in any process."""

from nnunet_semiseg.trainers.registry import find_trainer


def __getattr__(name):
    trainer = find_trainer(name) if name.startswith("nnUNetTrainer") else None
    if trainer is None:
        raise AttributeError(name)
    return trainer
