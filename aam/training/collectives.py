"""What the workers tell each other. Without a process group there is one worker, and nothing is sent."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This worker's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _AllGather(torch.autograd.Function):
    """Rows of all workers; a row's gradient is the sum of what all workers did with it."""

    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        dist.all_reduce(grad)
        start = sum(ctx.sizes[: dist.get_rank()])
        return grad[start : start + ctx.sizes[dist.get_rank()]], None


def all_gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """Concatenate the rows of all workers, with gradient.

    Parameters
    ----------
    rows : Tensor [b, ...]
        This worker's.
    sizes : list of int
        Rows of each worker.

    Returns
    -------
    Tensor [sum(sizes), ...]
    """
    if world_size() == 1:
        return rows
    return _AllGather.apply(rows, sizes)  # pyright: ignore[reportReturnType]


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over all workers, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_max(values: Tensor) -> Tensor:
    """Maximum over all workers, in place."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def barrier(device: torch.device) -> None:
    """Wait for all workers."""
    all_reduce_sum(torch.zeros((), device=device)).item()


def gather_array(values: np.ndarray, device: torch.device) -> np.ndarray:
    """Concatenate a one-dimensional array of each worker, in the order of the workers.

    Parameters
    ----------
    values : ndarray [n]
        This worker's; n may differ between workers.
    device : torch.device
        Where the backend communicates.
    """
    if world_size() == 1:
        return values
    sizes = torch.zeros(world_size(), dtype=torch.int64, device=device)
    sizes[rank()] = len(values)
    sizes_list = all_reduce_sum(sizes).tolist()
    rows = torch.from_numpy(np.ascontiguousarray(values)).to(device)
    padded = rows.new_zeros(max(sizes_list))
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in sizes_list]
    dist.all_gather(gathered, padded)
    parts = [part[:size].cpu().numpy() for part, size in zip(gathered, sizes_list, strict=True)]
    return np.concatenate(parts)
