"""What a model's outputs mean: the negative log-likelihood of each example, and how the Fisher is formed from it.

Shape suffixes: B examples, C classes, T tokens, V vocabulary, K columns of a square root of the output Hessian.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tda.errors import InputError


class Likelihood(Protocol):
    """p(targets | outputs), seen through its negative logarithm.

    One whose loss is no negative log-likelihood, such as a mean of several, also has `sampled_loss(outputs, drawn)`, of shape (batch,):
    what the sampled Fisher differentiates instead, with gradients g in the outputs such that E_drawn[g g^T] = Hessian of the loss.
    """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """-log p(targets | outputs) per example, shape (batch,), in nats."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise InputError where targets cannot belong to outputs (shape, dtype or range)."""

    def draws(self, outputs: Tensor) -> int:
        """How many uniform numbers one example needs to sample its targets."""

    def sample(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """Targets drawn from p(. | outputs); uniforms (batch, draws) in (0, 1); ignored positions of `targets` stay ignored."""

    def hessian_columns(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Columns c_k (each shaped like outputs) with sum_k c_k c_k^T = E_y[grad grad^T] per example; InputError: too many."""

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """The Hessian of the loss in the outputs, times tangents (..., *outputs.shape), example by example: the same shape."""


def _no_columns(name: str) -> InputError:
    return InputError(f'fisher = "exact" cannot enumerate the labels of {name}; use fisher = "sampled" or "empirical"')


def _check_classes(labels: Tensor, classes: int) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"targets must be integer class indices, got dtype {labels.dtype}; convert them in the dataset")
    bad = (labels < 0) | (labels >= classes)
    if bool(bad.any()):
        where = int(bad.reshape(len(labels), -1).any(1).nonzero()[0])
        place = f" at place {where} of the batch" if len(labels) > 1 else ""
        raise InputError(f"target {int(labels[bad][0])}{place} is out of range: the model has classes 0..{classes - 1}")


def _softmax_product(outputs: Tensor, tangents: Tensor) -> Tensor:
    """(diag(p) - p p^T) u along the last axis, p = softmax(outputs)."""
    p = outputs.softmax(-1)
    return p * (tangents - (p * tangents).sum(-1, keepdim=True))


def _pick(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Class indices by inversion of the cumulative distribution, in float64; uniforms lacks the class axis."""
    cumulative = probabilities.double().cumsum(-1)
    # Scaled by the total, so that rounding in the sum can never put a draw past the last class.
    drawn = torch.searchsorted(cumulative.contiguous(), (uniforms.double() * cumulative[..., -1]).unsqueeze(-1))
    return drawn.squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


@dataclass(frozen=True)
class Categorical:
    """One class per example: outputs (batch, classes) are logits, targets (batch,) class indices; loss = cross-entropy."""

    max_columns: int = 1024

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, shape (batch,), in nats."""
        return F.cross_entropy(outputs, targets, reduction="none")

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise InputError unless outputs are (batch, classes) and targets are class indices in range."""
        if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
            raise InputError(
                f"Categorical takes outputs (batch, classes) and targets (batch,), got {tuple(outputs.shape)} and {tuple(targets.shape)}; "
                "for tokens use TokenCategorical"
            )
        _check_classes(targets, outputs.shape[1])

    def draws(self, outputs: Tensor) -> int:
        """One uniform number per example."""
        return 1

    def sample(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """Class indices (batch,) drawn from softmax(outputs)."""
        return _pick(outputs.softmax(-1), uniforms[:, 0])

    def hessian_columns(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """sqrt(p_c) (p - e_c) for each class c: the gradients of -log p_c weighted by their probability."""
        if outputs.shape[1] > self.max_columns:
            raise _no_columns(f"{outputs.shape[1]} classes")
        p_BC = outputs.softmax(-1)
        for c in range(outputs.shape[1]):
            column = p_BC.clone()
            column[:, c] -= 1
            yield p_BC[:, c : c + 1].sqrt() * column

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """(diag(p) - p p^T) u for tangents u (..., batch, classes)."""
        return _softmax_product(outputs, tangents)


@dataclass(frozen=True)
class TokenCategorical:
    """One class per token: outputs (batch, tokens, vocabulary), targets (batch, tokens).

    targets[b, t] is the label of outputs[b, t]: a causal language model's dataset shifts its labels by one and ends them with
    `ignore_index`. Ignored positions add nothing. The loss is the sum over an example's tokens (reduction "sum", the
    log-likelihood of the sequence) or their mean.
    """

    ignore_index: int = -100
    reduction: Literal["sum", "mean"] = "sum"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy summed (or averaged) over the labelled tokens of each example, shape (batch,), in nats."""
        token = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=self.ignore_index, reduction="none")
        total = token.view(targets.shape).sum(1)
        return total if self.reduction == "sum" else total / self._labelled(targets)

    def sampled_loss(self, outputs: Tensor, drawn: Tensor) -> Tensor:
        """The loss where that is a sum over tokens; where it is the mean over T, sqrt(T) of it.

        A mean of T negative log-likelihoods is none of its own: its Hessian is 1 / T of the sum's, its squared gradients are 1 / T^2.
        """
        loss = self.loss(outputs, drawn)
        return loss if self.reduction == "sum" else loss * self._labelled(drawn).sqrt()

    def _labelled(self, targets: Tensor) -> Tensor:
        return (targets != self.ignore_index).sum(1).clamp(min=1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise InputError unless outputs are (batch, tokens, vocabulary) and targets fit, ignored positions apart."""
        if outputs.ndim != 3 or targets.shape != outputs.shape[:2]:
            raise InputError(
                "TokenCategorical expects outputs (batch, tokens, vocabulary) and targets (batch, tokens), "
                f"got {tuple(outputs.shape)} and {tuple(targets.shape)}"
            )
        _check_classes(targets.masked_fill(targets == self.ignore_index, 0), outputs.shape[2])

    def draws(self, outputs: Tensor) -> int:
        """One uniform number per token position."""
        return int(outputs.shape[1])

    def sample(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """Tokens (batch, tokens) drawn from softmax(outputs) at labelled positions, ignore_index elsewhere."""
        drawn = _pick(outputs.softmax(-1), uniforms)
        return torch.where(targets == self.ignore_index, self.ignore_index, drawn)

    def hessian_columns(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Never available: tokens x vocabulary columns are too many."""
        raise _no_columns(f"{outputs.shape[1]} tokens x {outputs.shape[2]} words")

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """(diag(p) - p p^T) u token by token for tangents u (..., batch, tokens, vocabulary); 0 where the token is ignored."""
        labelled = (targets != self.ignore_index).to(outputs.dtype)
        if self.reduction == "mean":
            labelled = labelled / labelled.sum(1, keepdim=True).clamp(min=1)
        return _softmax_product(outputs, tangents) * labelled[..., None]


@dataclass(frozen=True)
class Gaussian:
    """Regression with unit noise: loss = 0.5 ||targets - outputs||^2; outputs (batch, ...), targets as many numbers."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error summed over outputs, shape (batch,); the constant of the density is left out."""
        squares: Tensor = (outputs - targets.view_as(outputs)).square()
        return 0.5 * squares.reshape(len(outputs), -1).sum(1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise InputError unless targets are real numbers as many as outputs."""
        _check_real(outputs, targets, "Gaussian")

    def draws(self, outputs: Tensor) -> int:
        """One uniform number per output."""
        return int(outputs[0].numel())

    def sample(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """outputs + standard normal noise."""
        noise: Tensor = torch.special.ndtri(uniforms.double()).to(outputs.dtype)
        return outputs + noise.view_as(outputs)

    def hessian_columns(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """Unit vectors: the Hessian with respect to the outputs is the identity."""
        flat = outputs.reshape(len(outputs), -1)
        for k in range(flat.shape[1]):
            column = torch.zeros_like(flat)
            column[:, k] = 1
            yield column.view_as(outputs)

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """The tangents themselves: the Hessian is the identity."""
        return tangents


@dataclass(frozen=True)
class Bernoulli:
    """Independent yes/no outputs: logits and 0/1 targets of one shape (batch, ...); loss = binary cross-entropy summed over outputs."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy summed over an example's outputs, shape (batch,), in nats."""
        each = F.binary_cross_entropy_with_logits(outputs, targets.view_as(outputs).to(outputs.dtype), reduction="none")
        return each.reshape(len(outputs), -1).sum(1)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise InputError unless targets are within [0, 1], as many as outputs."""
        _check_real(outputs, targets, "Bernoulli")
        bad = (targets < 0) | (targets > 1)
        if bool(bad.any()):
            raise InputError(f"Bernoulli targets must lie in [0, 1], got {float(targets[bad][0])}; rescale them in the dataset")

    def draws(self, outputs: Tensor) -> int:
        """One uniform number per output."""
        return int(outputs[0].numel())

    def sample(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """1 with probability sigmoid(outputs), else 0."""
        return (uniforms.view_as(outputs) < outputs.double().sigmoid()).to(outputs.dtype)

    def hessian_columns(self, outputs: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """sqrt(p (1 - p)) along each output."""
        p = outputs.sigmoid()
        root = (p * (1 - p)).sqrt().reshape(len(outputs), -1)
        for k in range(root.shape[1]):
            column = torch.zeros_like(root)
            column[:, k] = root[:, k]
            yield column.view_as(outputs)

    def hessian_product(self, outputs: Tensor, targets: Tensor, tangents: Tensor) -> Tensor:
        """p (1 - p) u for tangents u (..., *outputs.shape)."""
        p = outputs.sigmoid()
        return p * (1 - p) * tangents


def _check_real(outputs: Tensor, targets: Tensor, name: str) -> None:
    if len(targets) != len(outputs) or targets.numel() != outputs.numel():
        raise InputError(f"{name} expects as many targets as outputs, got {tuple(targets.shape)} for outputs {tuple(outputs.shape)}")
    if not bool(torch.isfinite(targets.to(torch.float64)).all()):
        raise InputError(f"{name} targets must be finite numbers; remove the examples whose target is NaN or infinite")
