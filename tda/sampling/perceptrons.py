"""Copies of a multilayer perceptron, their products written out: few kernels, none of which moves data only.

A layer's weight and bias are one matrix [W b], and every activation has a row of ones below it, so that biases need no kernels of their
own, neither forwards nor for their gradients. Activations lie features first, (C, O, B): the softmax then runs over whole vectors of
examples instead of a few classes. Shape suffixes: C chains (or any copies), B examples, I inputs and O outputs of a layer, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tda.attributed import Attributed
from tda.likelihoods import Categorical
from tda.problem import Batch
from tda.products import fast_float32
from tda.sampling.ensembles import Gradient
from tda.stacked_mlp import linear_layers


class Perceptrons:
    """Copies of a Sequential of Linear layers with biases and ReLU between them, all of whose parameters move.

    The coordinates of a copy: each layer's [W b], row by row, (D,).
    """

    how = "products"

    def __init__(self, attributed: Attributed, data: Batch) -> None:
        self.likelihood = attributed.problem.likelihood
        self.layers = linear_layers(attributed.problem, attributed.model, data)
        self.shapes = [(layer.out_features, layer.in_features + 1) for layer in self.layers.values()]

    @staticmethod
    def of(attributed: Attributed, data: Batch) -> Perceptrons | None:
        """The copies of this model, if it is of the kind."""
        found = Perceptrons(attributed, data)
        moving = {name for block in attributed.blocks for name in block.parameters}
        return found if found.layers and moving == {name for name, _ in attributed.model.named_parameters()} else None

    def center(self) -> Tensor:
        """The model's own weights, (D,)."""
        with torch.no_grad():
            return torch.cat([torch.cat([layer.weight, layer.bias[:, None]], 1).flatten() for layer in self.layers.values()])

    def _matrices(self, weights: Tensor) -> list[Tensor]:
        """Each layer's [W b], (..., O, I + 1): views of (..., D)."""
        pieces = weights.split([out * width for out, width in self.shapes], -1)
        return [piece.unflatten(-1, shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """Weights (..., D) by the names of the parameters: views."""
        found: dict[str, Tensor] = {}
        for name, matrix in zip(self.layers, self._matrices(weights), strict=True):
            found |= {f"{name}.weight": matrix[..., :-1], f"{name}.bias": matrix[..., -1]}
        return found

    def prepare(self, data: Batch) -> Batch:
        """Inputs (n, I + 1) with a 1 appended."""
        return Batch(torch.cat([data.inputs, torch.ones_like(data.inputs[:, :1])], 1), data.targets)

    def gradient(self, weights: Tensor, into: Tensor) -> Gradient:
        """By hand."""
        matrices, gradients = self._matrices(weights), self._matrices(into)
        back = [matrix[..., :-1].transpose(1, 2) for matrix in matrices]
        hidden: list[Tensor] = []

        def gradient(batch: Batch, losses: Tensor) -> None:
            inputs, targets = batch
            if not hidden or hidden[0].shape[2] != inputs.shape[1]:  # the rows of ones stay, and what is above them is written over
                hidden[:] = [weights.new_ones(len(weights), out + 1, inputs.shape[1]) for out, _ in self.shapes[:-1]]
            kept = [inputs.transpose(1, 2), *hidden]
            for layer, above in enumerate(hidden):
                torch.bmm(matrices[layer], kept[layer], out=above[:, :-1]).relu_()
            seed = self._seed(torch.bmm(matrices[-1], kept[-1]), targets, losses)
            for layer in range(len(matrices) - 1, -1, -1):
                torch.bmm(seed, kept[layer].transpose(1, 2), out=gradients[layer])
                if layer:
                    seed = torch.ops.aten.threshold_backward(torch.bmm(back[layer], seed), kept[layer][:, :-1], 0)

        return gradient

    def _seed(self, outputs_CKB: Tensor, targets_CB: Tensor, losses_C: Tensor) -> Tensor:
        """The gradient of each copy's mean loss with respect to its outputs, (C, K, B); the losses are written on the way."""
        size = outputs_CKB.shape[2]
        if type(self.likelihood) is Categorical:
            log = torch.log_softmax(outputs_CKB, 1)
            targets = targets_CB[:, None]
            torch.mean(log.gather(1, targets), (1, 2), out=losses_C).neg_()
            return log.exp_().scatter_add_(1, targets, log.new_full((1, 1, 1), -1.0).expand(len(log), 1, size)).div_(size)
        rows = outputs_CKB.transpose(1, 2).flatten(0, 1).requires_grad_()
        losses = self.likelihood.loss(rows, targets_CB.flatten(0, 1)) / size
        torch.sum(losses.detach().view(-1, size), 1, out=losses_C)
        (found,) = torch.autograd.grad(losses.sum(), rows)
        return found.view(len(outputs_CKB), size, -1).transpose(1, 2)

    def outputs(self, weights: Tensor, batch: Batch) -> Tensor:
        """Every copy's outputs, (C, B, K), lying in memory as (C, K, B)."""
        first, *rest = self._matrices(weights)
        copies, inputs = len(weights), batch.inputs
        with torch.no_grad(), fast_float32():
            found = torch.mm(first.reshape(-1, first.shape[2]), inputs.T).view(copies, -1, len(inputs))
            for matrix in rest:
                found = torch.bmm(matrix[..., :-1], found.relu_()).add_(matrix[..., -1:])
        return found.transpose(1, 2)
