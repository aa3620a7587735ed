"""Rounds of training that grow the labeled set by consensus (FLARE22 two-stage method, "Pseudo labeling").

To be read in this order: ``settings`` (what is asked), ``setup`` (what it is asked of), ``manifest`` (what is done),
``steps`` (the steps of a round in their order, and what stops the rounds after one), ``runner``. Each step has a module
of its own: ``predicting``, ``scoring``, ``selecting``, ``next_dataset``, ``training``.
"""

from pseudo_label.rounds.runner import Rounds
from pseudo_label.rounds.settings import RoundsSettings

__all__ = ["Rounds", "RoundsSettings"]
