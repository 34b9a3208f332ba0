"""Parts that all encoders share.

Shape letters: N rows, T items of a row, R items of all rows, D width, E = 3 * D, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aam.model.cpu import Dropout, bf16_attention


@dataclass(frozen=True)
class Packing:
    """Where items stand among the slots of rows, and back: what is done to each item alone skips empty slots."""

    mask: Tensor
    """bool [N, T]: True where there is an item."""
    slot: Tensor
    """int64 [R]: slot of each item, counted over all rows."""
    item: Tensor
    """int64 [N, T]: item of each slot; of an empty one, some other."""

    @staticmethod
    def of(mask_NT: Tensor) -> Packing:
        """The packing of a mask; reads it on the host."""
        slot_R = mask_NT.flatten().nonzero().squeeze(1)
        item_NT = mask_NT.flatten().cumsum(0).sub_(1).clamp_(min=0).view(mask_NT.shape)
        return Packing(mask_NT, slot_R, item_NT)

    def pack(self, x_NTD: Tensor) -> Tensor:
        """Rows [N, T, D] to items [R, D]."""
        return F.embedding(self.slot, x_NTD.flatten(0, 1))  # its backward adds in a fixed order

    def unpack(self, x_RD: Tensor) -> Tensor:
        """Items [R, D] to rows [N, T, D]; empty slots hold items that are not theirs."""
        return F.embedding(self.item, x_RD)


class Attention(nn.Module):
    """Multi-head self-attention; empty items are not attended to."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_NTD: Tensor, key_mask_NT: Tensor | None, packing: Packing | None = None) -> Tensor:
        """Mix the items of each row.

        Parameters
        ----------
        x_NTD : Tensor
            Items; [R, D] where they are packed.
        key_mask_NT : Tensor of bool or None
            True where there is an item, at least one in each row; None where all slots are full.
        packing : Packing, optional
            Of the mask, where the items are packed.

        Returns
        -------
        Tensor
            In the shape of the input. What stands in empty slots means nothing.
        """
        qkv_NTE = self.qkv(x_NTD)
        if packing is None:
            return self.out(self._mix(qkv_NTE, key_mask_NT))
        return self.out(packing.pack(self._mix(packing.unpack(qkv_NTE), packing.mask)))

    def _mix(self, qkv_NTE: Tensor, key_mask_NT: Tensor | None) -> Tensor:
        N, T, E = qkv_NTE.shape
        if qkv_NTE.device.type == "cpu" and qkv_NTE.dtype == torch.bfloat16:
            return bf16_attention(qkv_NTE, key_mask_NT, self.heads)
        q, k, v = qkv_NTE.view(N, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None if key_mask_NT is None else key_mask_NT[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(N, T, E // 3)


class Block(nn.Module):
    """Pre-norm transformer block; dropout on the residual branches only."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = Dropout(dropout)

    def forward(self, x_NTD: Tensor, key_mask_NT: Tensor | None, packing: Packing | None = None) -> Tensor:
        """Items to items of the same shape; see `Attention.forward`."""
        x_NTD = x_NTD + self.dropout(self.attention(self.attention_norm(x_NTD), key_mask_NT, packing))
        return x_NTD + self.dropout(self.mlp(self.mlp_norm(x_NTD)))


class Transformer(nn.Module):
    """Stack of blocks, each initialised on its own, with a norm at its end."""

    def __init__(self, dim: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.recompute = False
        """Whether the backward pass computes each block's activations anew: less memory, 1.4 times the time."""

    def forward(self, x_NTD: Tensor, key_mask_NT: Tensor | None = None) -> Tensor:
        """Items [N, T, D] to items [N, T, D]; see `Attention.forward` for the mask."""
        packing = None
        # Not on a GPU, which would have to be waited for.
        if self.blocks and key_mask_NT is not None and key_mask_NT.device.type == "cpu":
            packing = Packing.of(key_mask_NT)
            x_NTD = packing.pack(x_NTD)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_NTD = checkpoint(block, x_NTD, key_mask_NT, packing, use_reentrant=False)
            else:
                x_NTD = block(x_NTD, key_mask_NT, packing)
        x_NTD = self.norm(x_NTD)
        return x_NTD if packing is None else packing.unpack(x_NTD)


class AttentionPool(nn.Module):
    """Weighted mean of the items of a row, with weights of its own in each head."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.score = nn.Linear(dim, heads)
        self.value = nn.Linear(dim, dim)

    def forward(self, x_NTD: Tensor, mask_NT: Tensor | None = None) -> Tensor:
        """Items [N, T, D] to one vector a row, [N, D]; see `Attention.forward` for the mask."""
        score_NTH = self.score(x_NTD).float()
        if mask_NT is not None:
            score_NTH = score_NTH.masked_fill(~mask_NT[..., None], float("-inf"))
        weight_NTH = score_NTH.softmax(dim=1).to(x_NTD.dtype)
        mean_NHD = weight_NTH.transpose(1, 2) @ x_NTD
        # The mean of linear maps is the map of the mean, and that is one vector in place of T.
        weight_HdD = self.value.weight.unflatten(0, (self.heads, -1))
        value_NHd = torch.einsum("nhD,hdD->nhd", mean_NHD, weight_HdD)
        return value_NHd.flatten(1) + self.value.bias


class SampleSummary(nn.Module):
    """One vector of a sample from the vectors of its ASVs, whatever their order.

    Beside attention pooling it sees the sample's richness (summed features over sqrt(n), and log n), on which
    UniFrac depends, and the abundance-weighted mean, on which most targets do: no softmax over ASVs can give
    either.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.pool = AttentionPool(dim, heads)
        self.features = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(3 * dim + 1, dim)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor, log_abundance_BS: Tensor) -> Tensor:
        """Summarise each sample.

        Parameters
        ----------
        x_BSD : Tensor
            Vectors of the ASVs.
        mask_BS : Tensor of bool
            True where a slot holds an ASV, at least one in each row.
        log_abundance_BS : Tensor of float32
            Natural log of the relative abundance.

        Returns
        -------
        Tensor [B, D]
        """
        # float32 under autocast too: bfloat16 cannot tell 1,001 ASVs from 1,004.
        present_BS1 = mask_BS[..., None].float()
        richness_B1 = present_BS1.sum(dim=1)
        abundance_BS1 = log_abundance_BS.exp()[..., None] * present_BS1
        # A sum of linear features is the feature of the sum: one row for each sample in place of its slots.
        weight_summed, weight_averaged = self.features.weight.chunk(2)
        bias_summed, bias_averaged = self.features.bias.chunk(2)
        pooled_BD = self.pool(x_BSD, mask_BS)
        with torch.autocast(x_BSD.device.type, enabled=False):
            x_BSD = x_BSD.to(weight_summed.dtype)
            summed_BD = F.linear((x_BSD * present_BS1).sum(dim=1), weight_summed) + richness_B1 * bias_summed
            averaged_BD = F.linear((x_BSD * abundance_BS1).sum(dim=1), weight_averaged)
            averaged_BD = averaged_BD + abundance_BS1.sum(dim=1) * bias_averaged
        parts = [pooled_BD, summed_BD / richness_B1.sqrt(), averaged_BD, richness_B1.log()]
        return self.out(torch.cat(parts, dim=-1))


class AbundanceEmbedding(nn.Module):
    """Vector of a log relative abundance; with `hideable`, a learned one where the abundance is hidden.

    All vectors are 0 at first: what does not depend on abundance (unweighted UniFrac) then learns faster, and
    what does finds it in a few updates.
    """

    def __init__(self, dim: int, *, hideable: bool = False) -> None:
        super().__init__()
        last = nn.Linear(dim, dim)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(1, dim), nn.GELU(), last)
        self.hidden = nn.Parameter(torch.zeros(dim)) if hideable else None

    def forward(self, log_abundance_BS: Tensor, hidden_BS: Tensor | None = None) -> Tensor:
        """Log relative abundances [B, S] to vectors [B, S, D]; `hidden_BS` is True where one is hidden."""
        vector_BSD = self.mlp(log_abundance_BS[..., None] / 5)  # logs are 0 to -10: bring them near 1
        if hidden_BS is None:
            return vector_BSD
        assert self.hidden is not None
        return torch.where(hidden_BS[..., None], self.hidden.to(vector_BSD.dtype), vector_BSD)
