"""What a CPU needs done in another way: dropout, and attention in bfloat16. NOTES.md has the ratios.

Shape letters: N rows, T items of a row, D width, H heads, d width of a head; n rows of a piece.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SCORES = 2**20
"""Attention scores at a time: about what the caches hold."""


class Dropout(nn.Dropout):
    """Dropout with four elements drawn from each random number on a CPU, where the drawing takes the time."""

    def forward(self, input: Tensor) -> Tensor:
        """As in torch; the probability is rounded to a multiple of 2 ** -16."""
        if input.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(input)
        dropped = round(self.p * 2**16)
        numbers = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        of_element = numbers.view(torch.int16)[: input.numel()].view(input.shape)
        return _Drop.apply(input, of_element < dropped - 2**15, 2**16 / (2**16 - dropped))


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(dropped)
        ctx.scale = scale
        return (x * scale).masked_fill_(dropped, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        (dropped,) = ctx.saved_tensors
        return (dout * ctx.scale).masked_fill_(dropped, 0), None, None


def bf16_attention(qkv_NTE: Tensor, key_mask_NT: Tensor | None, heads: int) -> Tensor:
    """Multi-head attention by batched matrix products.

    The backward pass of PyTorch's own takes eight times as long in bfloat16. The attention weights are
    computed again there, not kept.

    Parameters
    ----------
    qkv_NTE : Tensor
        Queries, keys and values, E = 3 * H * d.
    key_mask_NT : Tensor of bool or None
        True where there is an item; None where there is one everywhere.
    heads : int
        H.

    Returns
    -------
    Tensor [N, T, H * d]
    """
    return _Attention.apply(qkv_NTE.contiguous(), key_mask_NT, heads)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_NTE: Tensor, key_mask_NT: Tensor | None, heads: int) -> Tensor:
        ctx.save_for_backward(qkv_NTE, key_mask_NT)
        ctx.heads = heads
        mixed_NTD = qkv_NTE.new_empty(*qkv_NTE.shape[:2], qkv_NTE.shape[2] // 3)
        with torch.autocast("cpu", enabled=False):
            for rows in _pieces(qkv_NTE, heads):
                q, k, v = _split(qkv_NTE[rows], 3, heads)
                mixed = torch.bmm(_weights(q, k, key_mask_NT, rows, heads), v)
                _join(mixed, mixed_NTD[rows].unsqueeze(2), 0, heads)
        return mixed_NTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmixed_NTD: Tensor) -> tuple[Tensor, None, None]:
        qkv_NTE, key_mask_NT = ctx.saved_tensors
        heads = ctx.heads
        dqkv_NTE = torch.empty_like(qkv_NTE)
        for rows in _pieces(qkv_NTE, heads):
            q, k, v = _split(qkv_NTE[rows], 3, heads)
            (dmixed,) = _split(dmixed_NTD[rows], 1, heads)
            weights = _weights(q, k, key_mask_NT, rows, heads)
            dqkv_nT3D = dqkv_NTE[rows].unflatten(2, (3, -1))
            _join(torch.bmm(weights.transpose(1, 2), dmixed), dqkv_nT3D, 2, heads)
            dweights = torch.bmm(dmixed, v.transpose(1, 2))
            softmax_backward = torch.ops.aten._softmax_backward_data.out
            dscores = softmax_backward(dweights, weights, -1, weights.dtype, grad_input=dweights)
            scale = q.shape[-1] ** -0.5
            _join(torch.bmm(dscores, k).mul_(scale), dqkv_nT3D, 0, heads)
            _join(torch.bmm(dscores.transpose(1, 2), q).mul_(scale), dqkv_nT3D, 1, heads)
        return dqkv_NTE, None, None


def _pieces(qkv_NTE: Tensor, heads: int) -> list[slice]:
    N, T, _ = qkv_NTE.shape
    step = max(1, SCORES // (heads * T * T))
    return [slice(start, start + step) for start in range(0, N, step)]


def _split(x_nTE: Tensor, parts: int, heads: int) -> list[Tensor]:
    """Each part as [n * H, T, d]."""
    n, T, _ = x_nTE.shape
    split = x_nTE.reshape(n, T, parts, heads, -1).permute(2, 0, 3, 1, 4)
    return [part.reshape(n * heads, T, -1) for part in split]


def _join(part: Tensor, out_nTPD: Tensor, number: int, heads: int) -> None:
    """The way back, into one part of several."""
    n, T, _, _ = out_nTPD.shape
    out_nTPD[:, :, number].view(n, T, heads, -1).copy_(part.view(n, heads, T, -1).transpose(1, 2))


def _weights(q: Tensor, k: Tensor, key_mask_NT: Tensor | None, rows: slice, heads: int) -> Tensor:
    """What each item takes from each other, [n * H, T, T]."""
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    if key_mask_NT is not None:
        mask = key_mask_NT[rows, None, None]
        scores.view(-1, heads, *scores.shape[1:]).masked_fill_(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1, out=scores)
