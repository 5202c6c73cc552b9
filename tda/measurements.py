"""Measurements f_q of a query's outputs other than its loss."""

from __future__ import annotations

import torch
from torch import Tensor


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Log-odds of the right class, log p / (1 - p), shape (batch,); outputs (batch, classes) logits, targets (batch,); higher is better."""
    right = outputs.gather(1, targets[:, None]).squeeze(1)
    others = outputs.masked_fill(torch.nn.functional.one_hot(targets, outputs.shape[1]).bool(), -torch.inf)
    return right - others.logsumexp(1)


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """|outputs - targets| summed over outputs, shape (batch,); lower is better."""
    return (outputs - targets.view_as(outputs)).abs().reshape(len(outputs), -1).sum(1)
