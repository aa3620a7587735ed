"""What every semi-supervised trainer needs and no single method owns; here is all that a method imports of it.

A method subclasses SemiSupervisedTrainer and states an ``Options`` dataclass, whose bases ask for parts of the frame;
how targets are made (``targets``); and how the student is held to them (``student_losses``).
"""

from nnunet_semiseg.trainers.frame.hooks import BOTH, SECOND, STUDENT, Network, Paper, Term, Unlabeled, Voxels
from nnunet_semiseg.trainers.frame.options import (
    MIXING,
    WHOLE_RUN,
    FrameOptions,
    PretrainingOptions,
    PseudoLabelOptions,
    RampOptions,
    SecondNetworkOptions,
    TeacherOptions,
    second_network_option,
)
from nnunet_semiseg.trainers.frame.trainer import SemiSupervisedTrainer

__all__ = [
    "BOTH",
    "MIXING",
    "SECOND",
    "STUDENT",
    "WHOLE_RUN",
    "FrameOptions",
    "Network",
    "Paper",
    "PretrainingOptions",
    "PseudoLabelOptions",
    "RampOptions",
    "SecondNetworkOptions",
    "SemiSupervisedTrainer",
    "TeacherOptions",
    "Term",
    "Unlabeled",
    "Voxels",
    "second_network_option",
]
