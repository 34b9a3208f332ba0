"""Parts that all encoders share.

Shape letters: N rows, T items of a row, D width, H heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention; empty items are not attended to."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_NTD: Tensor, key_mask_NT: Tensor | None) -> Tensor:
        """Mix the items of each row.

        Parameters
        ----------
        x_NTD : Tensor
            Items.
        key_mask_NT : Tensor of bool or None
            True where there is an item, at least one in each row; None where all slots are full.

        Returns
        -------
        Tensor [N, T, D]
            What stands in empty slots means nothing.
        """
        N, T, D = x_NTD.shape
        q, k, v = self.qkv(x_NTD).view(N, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if key_mask_NT is None else key_mask_NT[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(N, T, D))


class Block(nn.Module):
    """Pre-norm transformer block; dropout on the residual branches only."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_NTD: Tensor, key_mask_NT: Tensor | None) -> Tensor:
        """Items [N, T, D] to items [N, T, D]; see `Attention.forward` for the mask."""
        x_NTD = x_NTD + self.dropout(self.attention(self.attention_norm(x_NTD), key_mask_NT))
        return x_NTD + self.dropout(self.mlp(self.mlp_norm(x_NTD)))


class Transformer(nn.Module):
    """Stack of blocks, each initialised on its own, with a norm at its end."""

    def __init__(self, dim: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x_NTD: Tensor, key_mask_NT: Tensor | None = None) -> Tensor:
        """Items [N, T, D] to items [N, T, D]; see `Attention.forward` for the mask."""
        for block in self.blocks:
            x_NTD = block(x_NTD, key_mask_NT)
        return self.norm(x_NTD)


class AttentionPool(nn.Module):
    """Weighted mean of the items of a row, with weights of its own in each head."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.score = nn.Linear(dim, heads)
        self.value = nn.Linear(dim, dim)

    def forward(self, x_NTD: Tensor, mask_NT: Tensor | None = None) -> Tensor:
        """Items [N, T, D] to one vector a row, [N, D]; see `Attention.forward` for the mask."""
        N, T, D = x_NTD.shape
        score_NTH = self.score(x_NTD).float()
        if mask_NT is not None:
            score_NTH = score_NTH.masked_fill(~mask_NT[..., None], float("-inf"))
        weight_NTH = score_NTH.softmax(dim=1).to(x_NTD.dtype)
        value_NTHd = self.value(x_NTD).view(N, T, self.heads, D // self.heads)
        return (weight_NTH[..., None] * value_NTHd).sum(dim=1).reshape(N, D)


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
        summed_BSD, averaged_BSD = self.features(x_BSD).chunk(2, dim=-1)
        parts = [
            self.pool(x_BSD, mask_BS),
            (summed_BSD * present_BS1).sum(dim=1) / richness_B1.sqrt(),
            (averaged_BSD * abundance_BS1).sum(dim=1),
            richness_B1.log(),
        ]
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
