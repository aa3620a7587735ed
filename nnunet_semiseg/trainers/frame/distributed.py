"""Values of all ranks of a distributed training."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gathered(value: Any) -> list:
    """A picklable value of each rank; all ranks have to call this. Without DDP, the one value."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
