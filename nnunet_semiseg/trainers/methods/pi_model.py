"""Pi-model (Laine and Aila 2017): two noisy looks of one network at the same patch agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_semiseg.losses.consistency import clamped_noise, masked_mean
from nnunet_semiseg.trainers.frame import STUDENT, Paper, RampOptions, SemiSupervisedTrainer, Term
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class PiModelOptions(RampOptions):
    consistency_weight: float = option(1.0, "largest weight of the consistency term", low=0.0)
    noise: float = option(0.1, "SD of the noise on the second input, in normalized intensities", low=0.0)


class nnUNetTrainerPiModel(SemiSupervisedTrainer):
    """Pi-model: consistency of the student with itself under different augmentation.

    L = L_nnU-Net(labeled) + w(t) mean((p(x_strong) - p(x_weak + noise))^2)

    One network, no teacher; as in the paper, the gradient flows through both evaluations, which takes the memory of two
    batches. w(t) is the Gaussian ramp-up to ``consistency_weight``. The two evaluations differ by nnU-Net's intensity
    augmentation on one side and clamped Gaussian noise on the other; nnU-Net's networks have no dropout.
    """

    paper = Paper("Laine and Aila, ICLR 2017", 2017)
    idea = "two augmented views of an unlabeled patch get the same prediction"
    use_when = "as a reference implementation, a baseline without a teacher"
    corrected = ""
    labeled_by = "student"
    passes = (3, 0, 0, 0)
    terms = dict(supervised=STUDENT, consistency=STUDENT)
    switched_off = "consistency_weight=0"
    Options = PiModelOptions
    options: PiModelOptions

    def needs_unlabeled(self):
        return self.options.consistency_weight > 0

    def targets(self, unlabeled):
        """With a gradient."""
        with self.random_stream:
            noisy = clamped_noise(unlabeled.weak, self.options.noise)
        probabilities = self.labels.probabilities(self.logits(self.student, noisy))
        return {"probabilities": probabilities, "counts": torch.ones_like(probabilities[:, :1], dtype=torch.bool)}

    def targets_of_labels(self, hard, valid):
        return {"probabilities": self.labels.as_probabilities(hard), "counts": valid}

    def student_losses(self, image, probabilities, counts):
        own = self.labels.probabilities(self.logits(self.student, image))
        distance = masked_mean((own - probabilities).square().mean(1, keepdim=True), counts)
        yield {"consistency": Term(distance, self.options.consistency_weight * self.ramp())}
