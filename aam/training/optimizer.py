"""The optimizer, and the update that lets nothing non-finite reach the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aam.training.collectives import all_reduce_max


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the parameters that train; weight decay on the matrices of linear layers only.

    Parameters
    ----------
    model : nn.Module
        Not wrapped.
    weight_decay : float
        Not for norms, biases, embeddings and single vectors.
    """
    decayed, plain = [], []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_matrix = isinstance(module, nn.Linear) and name == "weight"
                (decayed if is_matrix else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def update(optimizer: torch.optim.Optimizer, loss_finite: Tensor, *, lr: float, clip_norm: float) -> Tensor:
    """Clip, check and step; clears the gradients.

    Parameters
    ----------
    optimizer : Optimizer
        With the gradients of the update.
    loss_finite : Tensor of bool []
        Whether the losses of the update were finite on this worker.
    lr : float
        Learning rate of the update.
    clip_norm : float
        Largest norm of all gradients.

    Returns
    -------
    skipped : Tensor of float32 []
        1 where loss or gradients were not finite on some worker, and weights and state were left as they are.
        On the device: reading it is the caller's choice.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm, foreach=True)
    skipped = all_reduce_max((~(norm.isfinite() & loss_finite)).float())
    for group in optimizer.param_groups:
        group["lr"] = lr
    # The fused optimizer leaves weights and state alone where this is 1: no wait for the device to find out.
    optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return skipped
