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


def sequence_log_odds(outputs: Tensor, targets: Tensor) -> Tensor:
    """Log-odds of all labelled tokens of a sequence together, log p / (1 - p), shape (batch,); higher is better.

    outputs (batch, tokens, vocabulary) logits, targets (batch, tokens), -100 where there is no label.
    """
    asked = targets != -100
    labels = targets.masked_fill(~asked, 0)
    right = outputs.gather(2, labels[..., None]).squeeze(2)
    others = outputs.scatter(2, labels[..., None], -torch.inf).logsumexp(2)
    # -log p of each token by its own log-odds: a sure token's is e^-40, which a cross-entropy rounds to 0.
    loss = (torch.nn.functional.softplus(others - right) * asked).sum(1)
    return -loss - torch.log(-torch.expm1(-loss))
