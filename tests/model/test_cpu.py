"""What CPUs do in another way gives what PyTorch gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from aam.model import cpu
from aam.model.cpu import Dropout, bf16_attention
from aam.model.layers import Packing, Transformer

N, T, H, D = 5, 7, 2, 8


def rows_and_mask(*, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, T, D, generator=generator, dtype=dtype)
    mask = torch.arange(T) < torch.tensor([3, 7, 1, 7, 5])[:, None]
    return x, mask


@pytest.mark.parametrize("scores", [1, 2 * H * T * T, 2**20])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_is_that_of_pytorch(monkeypatch, scores, masked, dtype):
    monkeypatch.setattr(cpu, "SCORES", scores)
    torch.manual_seed(0)
    mask = rows_and_mask()[1] if masked else None
    qkv = torch.randn(N, T, 3 * D, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.view(N, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
    theirs = theirs.transpose(1, 2).reshape(N, T, D)
    own = qkv.detach().to(dtype).requires_grad_()
    ours = bf16_attention(own, mask, H)
    near = {} if dtype == torch.float64 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(ours.double(), theirs, **near)
    upstream = torch.randn(N, T, D, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(ours, own, upstream.to(dtype))
    torch.testing.assert_close(gradient.double(), *torch.autograd.grad(theirs, qkv, upstream), **near)


def test_dropout_keeps_the_mean_and_drops_its_share_in_both_directions():
    torch.manual_seed(0)
    dropout, x = Dropout(0.1), torch.ones(999, 501, requires_grad=True)
    y = dropout(x)
    dropped = (y == 0).double().mean().item()
    assert abs(dropped - 0.1) < 5 * (0.09 / x.numel()) ** 0.5
    assert abs(y.mean().item() - 1) < 0.005
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach())
    assert not torch.equal(dropout(x), y)


def test_dropout_leaves_evaluation_alone():
    x = torch.randn(3, 5)
    torch.testing.assert_close(Dropout(0.5).eval()(x), x, rtol=0, atol=0)
    torch.testing.assert_close(Dropout(0.0)(x), x, rtol=0, atol=0)


def test_packed_rows_are_rows_by_themselves():
    torch.manual_seed(0)
    stack = Transformer(D, H, 2, 0.0).double()
    x, mask = rows_and_mask()
    together = stack(x, mask)
    for row, own in enumerate(mask):
        torch.testing.assert_close(together[row, own], stack(x[row : row + 1, own])[0])


def test_packing_goes_there_and_back():
    x, mask = rows_and_mask()
    packing = Packing.of(mask)
    packed = packing.pack(x)
    assert len(packed) == mask.sum()
    torch.testing.assert_close(packing.unpack(packed)[mask], x[mask], rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_recomputed_blocks_change_nothing(masked):
    x, mask = rows_and_mask(dtype=torch.float32)
    stack = Transformer(D, H, 2, 0.3)
    found = []
    for recompute in (False, True):
        stack.recompute = recompute
        torch.manual_seed(0)  # the same dropout, also where it is drawn again
        output = stack(x, mask if masked else None)
        found.append([output, *torch.autograd.grad(output.square().sum(), list(stack.parameters()))])
    for kept, recomputed in zip(*found, strict=True):
        assert torch.equal(kept, recomputed)
