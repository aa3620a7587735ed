"""What every semi-supervised trainer needs and no single method owns; here is all that a method imports of it.

A method subclasses SemiSupervisedTrainer, TwoPhaseTrainer or TwoNetworkTrainer and states an ``Options`` dataclass,
``build_companions()``, ``unsupervised_loss()`` and, where it differs from nnU-Net's, ``supervised_loss()``.
"""

from nnunet_semiseg.trainers.frame.hooks import (
    BOTH,
    SECOND,
    STUDENT,
    WHOLE_RUN,
    FrameOptions,
    Paper,
    RampOptions,
    Term,
    Unlabeled,
)
from nnunet_semiseg.trainers.frame.mixing import MixingOptions
from nnunet_semiseg.trainers.frame.trainer import SemiSupervisedTrainer
from nnunet_semiseg.trainers.frame.two_networks import SecondNetworkOptions, TwoNetworkTrainer, second_network_option
from nnunet_semiseg.trainers.frame.two_phases import PretrainingOptions, TwoPhaseTrainer

__all__ = [
    "BOTH",
    "SECOND",
    "STUDENT",
    "WHOLE_RUN",
    "FrameOptions",
    "MixingOptions",
    "Paper",
    "PretrainingOptions",
    "RampOptions",
    "SecondNetworkOptions",
    "SemiSupervisedTrainer",
    "Term",
    "TwoNetworkTrainer",
    "TwoPhaseTrainer",
    "Unlabeled",
    "second_network_option",
]
