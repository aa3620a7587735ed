"""Entropy minimization (Grandvalet and Bengio 2005), the simplest use of unlabeled data in the papers' tables."""

from __future__ import annotations

from dataclasses import dataclass

from nnunet_semiseg.trainers.frame import STUDENT, Paper, RampOptions, SemiSupervisedTrainer, Term
from nnunet_semiseg.trainers.options import option


@dataclass(frozen=True)
class EntropyMinimizationOptions(RampOptions):
    entropy_weight: float = option(0.1, "largest weight of the entropy", low=0.0)


class nnUNetTrainerEntropyMinimization(SemiSupervisedTrainer):
    """The student is asked to be sure of itself on unlabeled patches.

    L = L_nnU-Net(labeled) + w(t) mean_v(- sum_c p_vc ln p_vc) / u_max

    u_max = ln C, or R ln 2 for R regions (whose binary entropies add up). w(t) is the Gaussian ramp-up to
    ``entropy_weight``. The patches are augmented as the labeled ones are.
    """

    paper = Paper("Grandvalet and Bengio, NeurIPS 2004", 2004)
    idea = "predictions on unlabeled patches are made confident: their entropy is minimized"
    use_when = "as a reference implementation, the cheapest baseline"
    corrected = ""
    labeled_by = "student"
    passes = (2, 0, 0, 0)
    terms = dict(supervised=STUDENT, entropy=STUDENT)
    switched_off = "entropy_weight=0"
    Options = EntropyMinimizationOptions
    options: EntropyMinimizationOptions

    def needs_unlabeled(self):
        return self.options.entropy_weight > 0

    def student_losses(self, image):
        entropy = self.labels.entropy(self.logits(self.student, image))
        yield {"entropy": Term(entropy.mean() / self.labels.max_entropy, self.options.entropy_weight * self.ramp())}
