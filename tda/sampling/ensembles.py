"""Many copies of one model whose moving weights are the rows of one matrix: their gradients, and their outputs.

Four ways, chosen by what the model is: batched products written by hand for multilayer perceptrons (`tda.sampling.perceptrons`), torch's
vmap, one model after another, and that compiled (`tda.sampling.compiled`), where it is asked for or long runs earn it back.
Shape suffixes: C chains (or any copies), D numbers of a model that move, B examples of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from tda.attributed import Attributed
from tda.errors import InputError, cause
from tda.problem import Batch
from tda.sampling.kernels import Kernels
from tda.sampling.options import Sampling
from tda.stacked import Predict

#: A batch (C, B, ...) and where each chain's mean loss (C,) is to be written; the gradient goes where its maker was told.
Gradient = Callable[[Batch, Tensor], None]
#: Models of more numbers than this advance one after another: alone they keep a core busy, and together they leave its cache.
STACKED = 1 << 19


class Ensemble(Protocol):
    """Copies of a model."""

    @property
    def how(self) -> str:
        """How they are computed: "products", "vmap", "compiled" or "one by one: <why>"."""

    def center(self) -> Tensor:
        """The model's own moving weights, (D,)."""

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """Weights (..., D) by the names of the parameters, (..., *shape) each: views."""

    def prepare(self, data: Batch) -> Batch:
        """Examples as `gradient` and `outputs` want them."""

    def gradient(self, weights: Tensor, into: Tensor) -> Gradient:
        """The function that writes the gradients of each copy's mean loss into (C, D), at the weights (C, D) of the moment."""

    def outputs(self, weights: Tensor, batch: Batch) -> Tensor:
        """Every copy's outputs of one prepared batch, (C, B, ...), without gradients."""


def ensemble(attributed: Attributed, data: Batch, sampling: Sampling) -> Ensemble:
    """The fastest way to advance a group's chains of a model together. `data`: the training examples; some are used to try a way.

    Raises:
        InputError: `compiled` is true, and the model cannot be compiled.
    """
    from tda.sampling.compiled import Compiled, worth_compiling
    from tda.sampling.perceptrons import Perceptrons

    found = Perceptrons.of(attributed, data)
    if found is not None:
        return found
    alone = OneByOne(attributed, "a chain on its own")
    not_compiled = ""
    if sampling.compiled is True or (sampling.compiled == "auto" and worth_compiling(sampling, alone.numbers, data, alone.likelihood)):
        try:
            return Compiled(attributed, data, sampling.batch(len(data.targets)))
        except InputError as error:
            if sampling.compiled is True:
                raise InputError(f'compiled is true, but {error}; set it to false or "auto"') from error
            not_compiled = f"; not compiled: {error}"
    if min(sampling.together, sampling.chains) == 1:
        return OneByOne(attributed, f"a chain on its own{not_compiled}")
    if alone.numbers > STACKED:
        return OneByOne(attributed, f"{alone.numbers:,} parameters are enough to fill a device{not_compiled}")
    stacked = Stacked(attributed)
    why = _differs(stacked, alone, data)
    return OneByOne(attributed, why + not_compiled) if why else stacked


def _differs(stacked: Stacked, alone: OneByOne, data: Batch) -> str:
    """Why vmap cannot be used; empty where it gives what each copy alone gives. Tried on two copies and two examples each."""
    some = Batch(*(tree_map(lambda leaf: torch.stack([leaf[:2], leaf[-2:]]), part) for part in data))
    center = stacked.center()
    weights = torch.stack([center, center * 1.01])
    found = []
    for each in (stacked, alone):
        gradient, losses = torch.empty_like(weights), weights.new_empty(2)
        try:
            each.gradient(weights, gradient)(some, losses)
        except Exception as error:  # noqa: BLE001  (what vmap cannot do, it says in many ways)
            return f"torch cannot batch the model: {cause(error)}"
        found.append(torch.cat([gradient, losses[:, None]], 1))
    apart = float((found[0] - found[1]).norm() / found[1].norm().clamp(min=1e-30))
    return "" if apart < 1e-4 else f"batched, gradients differ by {apart:.1e} from those of each copy alone"


class _Copies:
    """What is common to the general ways: parameters side by side in the model's order."""

    def __init__(self, attributed: Attributed) -> None:
        self.problem, self.likelihood = attributed.problem, attributed.problem.likelihood
        self.model = copy.deepcopy(attributed.model).eval()
        moving = {name for block in attributed.blocks for name in block.parameters}
        self.moving: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in moving)
            if name in moving:
                self.moving[name] = parameter
        self.sizes = [parameter.numel() for parameter in self.moving.values()]
        self.shapes = [parameter.shape for parameter in self.moving.values()]
        self.numbers = sum(self.sizes)
        self.kernels = Kernels()
        self._center = torch.cat([parameter.detach().flatten() for parameter in self.moving.values()])

    def center(self) -> Tensor:
        """The model's own weights, (D,)."""
        return self._center.clone()

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """Weights (..., D) by the names of the parameters: views."""
        pieces = zip(self.moving, weights.split(self.sizes, -1), self.shapes, strict=True)
        return {name: piece.unflatten(-1, shape) if shape else piece.squeeze(-1) for name, piece, shape in pieces}

    def prepare(self, data: Batch) -> Batch:
        """The examples as they are."""
        return data


class Stacked(_Copies):
    """Copies that torch batches by itself."""

    how = "vmap"

    def gradient(self, weights: Tensor, into: Tensor) -> Gradient:
        """By vmap and autograd: copies do not share weights, so that their losses may be summed."""
        leaves = {name: view.detach().requires_grad_() for name, view in self.named(weights).items()}
        wrapped, likelihood = Predict(self.problem, self.model), self.likelihood

        def loss(values: dict[str, Tensor], inputs: Any, targets: Tensor) -> Tensor:
            return likelihood.loss(wrapped.outputs(values, inputs, targets), targets).mean()

        def gradient(batch: Batch, losses: Tensor) -> None:
            with self.kernels.forwards():
                found = vmap(loss)(leaves, batch.inputs, batch.targets)
            losses.copy_(found.detach())
            with self.kernels.backwards():
                parts = torch.autograd.grad(found.sum(), list(leaves.values()), materialize_grads=True)
            torch.cat([part.flatten(1) if part.ndim > 1 else part[:, None] for part in parts], 1, out=into)

        return gradient

    def outputs(self, weights: Tensor, batch: Batch) -> Tensor:
        """By vmap."""
        wrapped = Predict(self.problem, self.model)
        with torch.no_grad(), self.kernels.forwards():
            return vmap(wrapped.outputs, in_dims=(0, None, None))(self.named(weights), batch.inputs, batch.targets)


class OneByOne(_Copies):
    """Copies computed one after another by the model itself, whose weights are put where each copy's lie."""

    def __init__(self, attributed: Attributed, why: str) -> None:
        super().__init__(attributed)
        self.how = f"one by one: {why}"

    def _put(self, views: Mapping[str, Tensor]) -> None:
        for name, parameter in self.moving.items():
            parameter.data = views[name]

    def gradient(self, weights: Tensor, into: Tensor) -> Gradient:
        """By plain autograd."""
        copies = [self.named(row) for row in weights]
        rows = into.unbind(0)

        def gradient(batch: Batch, losses: Tensor) -> None:
            for c, views in enumerate(copies):
                self._put(views)
                one = Batch(*(tree_map(lambda leaf, c=c: leaf[c], part) for part in batch))
                with self.kernels.forwards():
                    loss = self.likelihood.loss(self.problem.predict(self.model, one), one.targets).mean()
                with self.kernels.backwards():
                    parts = torch.autograd.grad(loss, list(self.moving.values()), materialize_grads=True)
                losses[c] = loss.detach()
                torch.cat([part.flatten() for part in parts], out=rows[c])

        return gradient

    def outputs(self, weights: Tensor, batch: Batch) -> Tensor:
        """Each copy's, one after another."""
        found = []
        with torch.no_grad(), self.kernels.forwards():
            for row in weights:
                self._put(self.named(row))
                found.append(self.problem.predict(self.model, batch))
        return found[0][None] if len(found) == 1 else torch.stack(found)
