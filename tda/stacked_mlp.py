"""Gradients of many multilayer perceptrons at once, written out by hand: half the time of autograd, which keeps and passes over more.

The products are small and batched over models; the rest is bound by memory, so that every pass over activations counts. Every operation
is one that rounds as the corresponding one of a single model does, so that training together gives the bits of training alone where the
CPU's libraries keep to that; nothing relies on it.

Shape suffixes: M models, B examples of a batch, I inputs and O outputs of a layer, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from tda.likelihoods import Categorical, Likelihood
from tda.problem import Batch, Problem

#: Numbers in the longest vector of any CPU, in float32 with room to spare.
VECTOR = 64


def mlp_gradients(problem: Problem, model: nn.Module, batch: Batch) -> Callable[[list[Tensor], Tensor, Tensor], list[Tensor]] | None:
    """The function (parameters, inputs, targets) -> gradients of each model's mean loss; None where the model is not of this kind.

    The kind: a Sequential of Linear layers with biases and ReLU between them, all trained, on inputs (B, I), with the problem's default
    `predict` and one output row per example. Parameters in the model's order, weights (M, O, I) and biases (M, O).
    """
    if not linear_layers(problem, model, batch) or not all(parameter.requires_grad for parameter in model.parameters()):
        return None
    likelihood = problem.likelihood
    return lambda parameters, inputs, targets: _gradients(likelihood, parameters, inputs, targets)


def linear_layers(problem: Problem, model: nn.Module, batch: Batch) -> dict[str, nn.Linear]:
    """The layers by name, where the model is a Sequential of Linear layers with biases and ReLU between them; else none."""
    plain = type(model) is nn.Sequential and type(problem).predict is Problem.predict
    if not (plain and isinstance(batch.inputs, Tensor) and batch.inputs.ndim == 2):
        return {}
    assert isinstance(model, nn.Sequential)
    children = list(model.named_children())
    layers = {name: layer for name, layer in children[::2] if type(layer) is nn.Linear and layer.bias is not None}
    # One layer twice would be one parameter with two gradients.
    whole = 2 * len(layers) - 1 == len(model) and len(list(model.parameters())) == 2 * len(layers)
    return layers if whole and all(type(layer) is nn.ReLU for _, layer in children[1::2]) else {}


def _gradients(likelihood: Likelihood, parameters: list[Tensor], inputs_MBI: Tensor, targets_MB: Tensor) -> list[Tensor]:
    weights, biases = parameters[::2], parameters[1::2]
    kept = [inputs_MBI]
    for weight, bias in zip(weights, biases, strict=True):
        kept.append(torch.bmm(kept[-1], weight.transpose(1, 2)).add_(bias[:, None]))
        if len(kept) <= len(weights):
            kept[-1].relu_()
    seed_MBO, found = output_gradient(likelihood, kept.pop(), targets_MB), list[Tensor]()
    for layer in range(len(weights) - 1, -1, -1):
        found += [seed_MBO.sum(1), torch.bmm(seed_MBO.transpose(1, 2), kept[layer])]
        if layer:
            seed_MBO = torch.ops.aten.threshold_backward(torch.bmm(seed_MBO, weights[layer]), kept[layer], 0)
    return found[::-1]


def output_gradient(likelihood: Likelihood, outputs_MBC: Tensor, targets_MB: Tensor) -> Tensor:
    """Gradient of each model's mean loss with respect to its outputs, (M, B, C)."""
    models, size, classes = outputs_MBC.shape
    if type(likelihood) is Categorical:
        if classes_first_is_exact(classes, outputs_MBC.dtype):
            return _softmax_seed(outputs_MBC, targets_MB)
        log_MBC = torch.log_softmax(outputs_MBC, 2)
        chosen = torch.zeros_like(log_MBC).scatter_(2, targets_MB[:, :, None], -1.0 / size)
        return _log_softmax_backward(chosen, log_MBC, 2)
    outputs = outputs_MBC.flatten(0, 1).requires_grad_()
    losses = likelihood.loss(outputs, targets_MB.flatten(0, 1))
    (gradient,) = torch.autograd.grad(losses.sum() / size, outputs)
    return gradient.view(models, size, classes)


def _softmax_seed(outputs_MBC: Tensor, targets_MB: Tensor) -> Tensor:
    """The same for the cross-entropy, with the classes in front: along ten classes in a row a softmax costs more than all products."""
    models, size, classes = outputs_MBC.shape
    columns = models * size
    # Whole vectors: what is left over after them runs through other code, which rounds differently.
    wide_CB = outputs_MBC.new_zeros(classes, -(-columns // VECTOR) * VECTOR)
    wide_CB[:, :columns] = outputs_MBC.view(columns, classes).T
    log_CB = torch.log_softmax(wide_CB, 0)
    chosen = torch.zeros_like(log_CB)
    chosen[:, :columns].scatter_(0, targets_MB.reshape(1, columns), -1.0 / size)
    # Contiguous: how a sum runs over a tensor, and so how it rounds, depends on how the tensor lies in memory.
    return _log_softmax_backward(chosen, log_CB, 0)[:, :columns].T.contiguous().view(models, size, classes)


def _log_softmax_backward(gradient: Tensor, log: Tensor, dim: int) -> Tensor:
    found: Tensor = torch.ops.aten._log_softmax_backward_data(gradient, log, dim, log.dtype)  # noqa: SLF001  (its public name is autograd's)
    return found


@cache
def classes_first_is_exact(classes: int, dtype: torch.dtype) -> bool:
    """Whether a softmax over the first axis rounds as one over the last does, as it did for fewer classes than a vector has numbers.

    One different rounding in float32 would sooner or later put a ReLU on its other side, and the model on another path. In float64
    there is room for it.
    """
    if dtype == torch.float64:
        return True
    generator = torch.Generator().manual_seed(0)
    outputs = 3 * torch.randn(4, 64, classes, generator=generator).to(dtype)
    targets = torch.randint(classes, (4, 64), generator=generator)
    plain = outputs.flatten(0, 1).requires_grad_()
    losses = torch.nn.functional.cross_entropy(plain, targets.flatten(), reduction="none")
    (wanted,) = torch.autograd.grad(losses.sum() / 64, plain)
    return torch.equal(_softmax_seed(outputs, targets), wanted.view_as(outputs))
