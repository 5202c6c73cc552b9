"""Losses and measurements of every example under many copies of a model, in float64 from the copies' outputs.

Shape suffixes: M copies, B examples, K classes, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tda.errors import InputError
from tda.likelihoods import Categorical, Likelihood, TokenCategorical
from tda.problem import Problem


def example_losses(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """-log p(targets | outputs), (M, B) float64 in nats; outputs (M, B, ...), targets (B, ...) shared by the copies."""
    if type(likelihood) is Categorical:
        # Classes in front: along a few of them in a row a softmax costs more than the model.
        log_MKB = torch.log_softmax(outputs.transpose(1, 2), 1, dtype=torch.float64)
        return log_MKB.gather(1, targets.expand(len(outputs), 1, -1)).squeeze(1).neg_()
    if type(likelihood) is TokenCategorical:
        return token_losses(likelihood, outputs, targets).sum(2)
    return likelihood.loss(outputs.flatten(0, 1).double(), _double(_repeated(targets, outputs))).view(outputs.shape[:2])


def token_losses(likelihood: Likelihood, outputs: Tensor, targets: Tensor) -> Tensor:
    """Each token's part of its example's loss, (M, B, T) float64: 0 where it is ignored; the sum over T is the example's loss.

    Raises:
        InputError: the likelihood is not of tokens.
    """
    if not isinstance(likelihood, TokenCategorical):
        raise InputError(f"tokens = true needs the likelihood TokenCategorical, got {type(likelihood).__name__}; set tokens = false")
    labelled_BT = targets != likelihood.ignore_index
    chosen = targets.where(labelled_BT, 0).expand(len(outputs), *targets.shape)[..., None]
    found = _surprise(outputs, chosen) * labelled_BT
    return found if likelihood.reduction == "sum" else found / labelled_BT.sum(1, keepdim=True).clamp(min=1)


def _surprise(outputs: Tensor, chosen: Tensor) -> Tensor:
    """-log softmax(outputs)[chosen] over the last axis, (...,) float64; chosen (..., 1).

    Of float32 outputs, only what is gathered or added up is float64, in half the time. With m the largest output and r the probability
    of all others than the chosen one y, l = log(1 + exp(log r - log p_m + m - x_y)): r is a sum of positive terms, so that the error is
    some 1e-7, and where l is small, relative to l: 6e-8 times the outputs' differences.
    """
    if outputs.dtype != torch.float32:
        return torch.log_softmax(outputs, -1, dtype=torch.float64).gather(-1, chosen).squeeze(-1).neg_()
    share = torch.softmax(outputs, -1)
    largest, top = share.amax(-1).double(), outputs.amax(-1).double()
    others = share.scatter_(-1, chosen, 0.0).sum(-1).double()
    apart = top - outputs.gather(-1, chosen).squeeze(-1)
    return torch.nn.functional.softplus(others.log() - largest.log() + apart, threshold=40)


def measurements(problem: Problem, outputs: Tensor, targets: Tensor) -> Tensor:
    """f(w) of each query, (M, B) float64; a measurement that the user wrote is given outputs and targets in the model's own dtype."""
    own = type(problem).measurement is not Problem.measurement
    flat, repeated = outputs.flatten(0, 1), _repeated(targets, outputs)
    found = problem.measurement(flat, repeated) if own else problem.measurement(flat.double(), _double(repeated))
    return found.double().view(outputs.shape[:2])


def _repeated(targets_B: Tensor, outputs_MB: Tensor) -> Tensor:
    """The targets of all copies, one after another, (M B, ...)."""
    return targets_B.expand(len(outputs_MB), *targets_B.shape).flatten(0, 1)


def _double(targets: Tensor) -> Tensor:
    """Real targets in float64; labels as they are."""
    return targets.double() if targets.is_floating_point() else targets
