"""A training step: losses, gradients, and what happens to those that are not finite."""

from __future__ import annotations

import functools
import math

import torch
import torch.distributed as dist

from nnunet_semiseg.trainers.frame.distributed import gathered
from nnunet_semiseg.trainers.frame.hooks import Term
from nnunet_semiseg.trainers.frame.part import Part

# nnU-Net's own value for the student; the companions are clipped apart from it.
GRADIENT_CLIP = 12
# So many steps in a row with a loss that is not a number end the training.
MAX_NON_FINITE_STEPS = 20


class Step(Part):
    """Mixin: nnU-Net's step with more losses, networks and backward passes."""

    def train_step(self, batch: dict) -> dict:
        self.before_step()
        data = self.to_device(batch["data"])
        target = batch["target"]
        target = [self.to_device(t) for t in target] if isinstance(target, list) else self.to_device(target)
        self._unlabeled_keys: list[str] = []

        for optimizer in (self.optimizer, *self.companion_optimizers.values()):
            optimizer.zero_grad(set_to_none=True)
        terms: dict[str, Term] = {}
        loss = torch.zeros((), device=self.device)
        for group in self.losses(data, target):
            part = _weighted_sum(group)
            loss = loss + part.detach()
            terms |= group
            if part.requires_grad:
                self._backward(part)

        if self._step_is_finite(terms, [*batch["keys"], *self._unlabeled_keys]) and self._optimizer_step():
            self.after_step()
            self._last_loss = loss.cpu().numpy()
        self.global_step += 1
        # A skipped step repeats the loss of the one before, so that the epoch's mean stays a number.
        return {"loss": self._last_loss}

    def _backward(self, loss: torch.Tensor) -> None:
        (loss if self.grad_scaler is None else self.grad_scaler.scale(loss)).backward()

    def _step_is_finite(self, terms: dict[str, Term], keys: list[str]) -> bool:
        """Log the step's terms, and say whether all of them are finite on all ranks.

        Raises:
            RuntimeError: after MAX_NON_FINITE_STEPS in a row that are not.
        """
        names = [*terms, *self._step_monitors]
        values = torch.stack(
            [t.value.detach().float() for t in terms.values()] + list(self._step_monitors.values())
        ).tolist()
        self._step_monitors.clear()
        bad = [name for name, value in zip(terms, values) if not math.isfinite(value)]
        any_bad = bool(bad)
        if self.is_ddp:
            flag = torch.tensor(float(any_bad), device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            any_bad = bool(flag.item())
        if any_bad:
            if self.is_ddp:
                ranks = gathered((bad, keys if bad else []))
                bad, keys = (sorted({str(item) for rank in ranks for item in rank[i]}) for i in range(2))
            self._count_skipped_step(bad, keys)
            return False
        self._non_finite_in_a_row = 0
        for name, value in zip(names, values):
            self._epoch_sums.setdefault(name, []).append(value)
        for name, term in terms.items():
            if name != "supervised":
                self._epoch_sums.setdefault(f"{name}_weight", []).append(float(term.weight))
        return True

    def _count_skipped_step(self, bad: list[str], keys: list[str]) -> None:
        self._non_finite_in_a_row += 1
        self._non_finite_total += 1
        where = f" (cases {', '.join(map(str, keys))})" if keys else ""
        self.print_to_log_file(f"Step {self.global_step} is skipped: {', '.join(bad)} is not finite{where}")
        if self._non_finite_in_a_row >= MAX_NON_FINITE_STEPS:
            raise RuntimeError(
                f"{MAX_NON_FINITE_STEPS} steps in a row were not finite ({', '.join(bad)}{where}). Look at the images "
                "of these cases, or lower initial_lr"
            )

    def _optimizer_step(self) -> bool:
        """Clip and step; False if the gradient is not finite. (On CUDA the gradient scaler sees to that.)"""
        if self.is_ddp:
            self._average_gradients()
        optimizers = [self.optimizer, *self.companion_optimizers.values()]
        if self.grad_scaler is not None:
            for optimizer in optimizers:
                self.grad_scaler.unscale_(optimizer)
        norms = [torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP)]
        trainable = [p for p in self.companions.parameters() if p.grad is not None]
        if trainable:
            norms.append(torch.nn.utils.clip_grad_norm_(trainable, GRADIENT_CLIP))
        if self.grad_scaler is not None:
            for optimizer in optimizers:
                self.grad_scaler.step(optimizer)
            self.grad_scaler.update()
        elif all(torch.isfinite(norm) for norm in norms):
            for optimizer in optimizers:
                optimizer.step()
        else:
            self._count_skipped_step(["the gradient"], [])
            return False
        return True

    def _average_gradients(self) -> None:
        """Mean gradient over ranks, of the student and the companions.

        DDP itself averages during one backward pass of one wrapped network; here two passes and several networks
        contribute to a step.
        """
        parameters = (p for p in (*self.network.parameters(), *self.companions.parameters()) if p.grad is not None)
        gradients = [p.grad for p in parameters]
        for work in [dist.all_reduce(g, async_op=True) for g in gradients]:
            work.wait()
        torch._foreach_div_(gradients, dist.get_world_size())


def _weighted_sum(terms: dict[str, Term]) -> torch.Tensor:
    weighted = [value if weight == 1.0 else weight * value for value, weight in terms.values()]
    return functools.reduce(torch.add, weighted)
