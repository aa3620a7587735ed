"""The exponential-moving-average teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_semiseg.networks.features import Outputs


def unwrap(network: nn.Module) -> nn.Module:
    """The plain network inside DistributedDataParallel, torch.compile or a teacher."""
    if isinstance(network, (DistributedDataParallel, EMATeacher)):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


class EMATeacher(nn.Module):
    """A copy of a network whose weights are a moving average of the network's (Tarvainen and Valpola 2017).

    theta' <- a theta' + (1 - a) theta after each optimizer step t = 0, 1, ..., with

    * ``warm_up=True``: a = min(1 - 1 / (t + 1), decay). The first update copies the student and the first steps are a
      true running average, so an untrained teacher is forgotten at once.
    * ``warm_up=False``: a = decay from the start, for a teacher that starts from a trained student.

    Parameters are averaged, buffers (batch norm statistics; nnU-Net's instance norm has none) are copied: an average
    of counters and variances over time is no statistic of any network.

    The update runs over ``parameters()``, not over ``state_dict()``: nnU-Net's decoder holds a reference to the
    encoder, so a state dict names the same tensor up to four times and would be decayed as often.

    Args:
        student: The network to follow, possibly compiled or wrapped for DDP.
        decay: Largest a.
        warm_up: See above.
    """

    def __init__(self, student: nn.Module, decay: float, warm_up: bool):
        super().__init__()
        self.decay = decay
        self.warm_up = warm_up
        self._updates = 0
        self.module = copy.deepcopy(unwrap(student)).requires_grad_(False)
        # In a tuple, so that the compiled network is not a second submodule.
        self._run: tuple[Callable[[torch.Tensor], Outputs]] = (self.module,)

    def compile_with(self, compiled: Callable[[nn.Module], Callable]) -> None:
        """Run the network as ``compiled`` returns it, ``torch.compile`` say."""
        self._run = (compiled(self.module),)

    def forward(self, x: torch.Tensor) -> Outputs:
        return self._run[0](x)

    def current_decay(self) -> float:
        """The a of the next update."""
        return min(1.0 - 1.0 / (self._updates + 1), self.decay) if self.warm_up else self.decay

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """One step of the average, in place, in one fused kernel per device."""
        student = unwrap(student)
        torch._foreach_lerp_(list(self.module.parameters()), list(student.parameters()), 1.0 - self.current_decay())
        self._copy_buffers(student)
        self._updates += 1

    @torch.no_grad()
    def copy_from(self, student: nn.Module) -> None:
        """Make the teacher equal to the student and start the average anew."""
        student = unwrap(student)
        torch._foreach_copy_(list(self.module.parameters()), list(student.parameters()))
        self._copy_buffers(student)
        self._updates = 0

    def _copy_buffers(self, student: nn.Module) -> None:
        for mine, theirs in zip(self.module.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)

    def get_extra_state(self) -> dict[str, int]:
        return {"updates": self._updates}

    def set_extra_state(self, state: Any) -> None:
        self._updates = int(state["updates"])
