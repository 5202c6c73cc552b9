"""Products of the curvature with vectors, without ever forming it: Hessian, generalised Gauss-Newton matrix, and its block diagonal.

    hessian    H v = (1/N) sum_i d/dt grad l_i(w + t v)                     forward over reverse
    ggn        G v = (1/N) sum_i J_i^T (H_out,i (J_i v))                    J_i: outputs by parameters, H_out: of the loss in the outputs
    block_ggn  the same with the blocks of J taken one at a time

All vectors (queries) share one linearisation of each batch of examples, and are its batch axis in products of matrices. Memory grows
with D and with the activations of a batch, both times the number of vectors; nothing has D^2 entries.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tda import flat
from tda.attributed import Attributed
from tda.blocks import Block, to_matrix, to_parameters
from tda.data import batches
from tda.errors import InputError, cause
from tda.problem import Batch, Problem
from tda.products import fast_float32
from tda.solvers import columns
from tda.solvers.memory import RecentBatches, saved_bytes

Curvature = Literal["ggn", "hessian", "block_ggn"]

#: Tangents of activations, and of parameters, are made for so many vectors at a time that they stay below this many bytes; more is slower,
#: because it falls out of the caches (three times, on a small convolutional network).
TANGENT_BYTES = 32 << 20

Parameters = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Operator:
    """The curvature C of the mean loss over a training set, in the flat coordinates of `tda.flat`.

    attributed: the model, in eval mode; parameters that are frozen or skipped are constants. dataset: map-style. batch_size: examples
    of one linearisation; the products do not depend on it.
    Raises InputError at the first product where torch.func cannot differentiate the model, with the cause.
    """

    attributed: Attributed
    dataset: Any
    kind: Curvature
    batch_size: int

    @property
    def size(self) -> int:
        """D."""
        return flat.total(self.attributed.blocks)

    def product(self, vectors: Tensor, ids: Sequence[int] | None = None) -> Tensor:
        """C v for vectors (query, D), of the same shape and dtype; the mean over examples `ids`, or over all.

        The work is done in the model's dtype, what follows the outputs in float64.
        """
        ids = range(len(self.dataset)) if ids is None else ids
        blocks = self.attributed.blocks
        if self.kind == "block_ggn":
            parts = [([b], vectors[:, span.start : span.stop]) for b, span in zip(blocks, flat.spans(blocks), strict=True)]
            return torch.cat([self._mean(some, v, ids) for some, v in parts], 1)
        return self._mean(blocks, vectors, ids)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of C, (stop - start, D), in the model's dtype.

        Products with unit vectors, since C is symmetric; or outer products of gradients, where those are fewer multiplications.
        """
        blocks, ids = self.attributed.blocks, range(len(self.dataset))
        if self._by_columns:
            return columns.rows(
                self.attributed, self.dataset, start, stop, block_diagonal=self.kind == "block_ggn", batch_size=self.batch_size
            )
        if self.kind != "block_ggn":
            return self._mean(blocks, self._units(range(self.size), start, stop), ids)
        found = self._zeros(stop - start, self.size)
        for block, span in zip(blocks, flat.spans(blocks), strict=True):
            first, last = max(start, span.start), min(stop, span.stop)
            if first < last:
                found[first - start : last - start, span.start : span.stop] = self._mean([block], self._units(span, first, last), ids)
        return found

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.attributed.dtype, device=self.attributed.device)

    def _units(self, span: range, start: int, stop: int) -> Tensor:
        units = self._zeros(stop - start, len(span))
        units[torch.arange(stop - start), torch.arange(start, stop) - span.start] = 1
        return units

    def _mean(self, blocks: Sequence[Block], vectors: Tensor, ids: Sequence[int]) -> Tensor:
        """C restricted to `blocks` times vectors (query, size of the blocks), over examples `ids`."""
        assert len(ids) > 0
        if not len(vectors):
            return vectors.clone()
        width, moved = self._width, vectors.to(self.attributed.dtype)
        total = torch.zeros_like(moved)
        multiply = self._hessian if self.kind == "hessian" else self._ggn
        with _differentiable():
            for part in batches(ids, self.batch_size):
                batch = self._recent.load(part)
                step = max(1, TANGENT_BYTES // (width * len(part) + vectors.shape[1] * moved.element_size()))
                for k, product in enumerate(multiply(blocks, batch, moved.split(step))):
                    total[k * step : k * step + step] += product
        return total.div_(len(ids)).to(vectors.dtype)

    def _ggn(self, blocks: Sequence[Block], batch: Batch, vectors: Sequence[Tensor]) -> Iterator[Tensor]:
        outputs = self._outputs(batch)
        parameters = self._parameters(blocks)
        at, pull = vjp(outputs, parameters)  # type: ignore[misc]  # three values only where has_aux
        hessian_product = getattr(self.attributed.problem.likelihood, "hessian_product", None)
        if hessian_product is None:
            name = type(self.attributed.problem.likelihood).__name__
            raise InputError(
                f'likelihood {name} has no hessian_product(outputs, targets, tangents); define it, or use curvature = "hessian"'
            )
        for some in vectors:
            moved = vmap(lambda tangent: jvp(outputs, (parameters,), (tangent,))[1])(_tangents(blocks, some))
            yield _flat(blocks, vmap(pull)(hessian_product(at, batch.targets, moved))[0])

    def _hessian(self, blocks: Sequence[Block], batch: Batch, vectors: Sequence[Tensor]) -> Iterator[Tensor]:
        outputs, parameters = self._outputs(batch), self._parameters(blocks)
        gradient = grad(lambda at: self.attributed.problem.likelihood.loss(outputs(at), batch.targets).sum())
        for some in vectors:
            yield _flat(blocks, vmap(lambda tangent: jvp(gradient, (parameters,), (tangent,))[1])(_tangents(blocks, some)))

    def _outputs(self, batch: Batch) -> Callable[[Parameters], Tensor]:
        """Outputs of a batch, in float64 as losses are taken of them everywhere, as a function of parameters by name."""

        def outputs(parameters: Parameters) -> Tensor:
            with _PaddingIsConstant():
                named = {f"model.{name}": tensor for name, tensor in parameters.items()}
                found: Tensor = functional_call(self._predictor, {**self._constants, **named}, (batch,))
                return found.double()

        return outputs

    def _parameters(self, blocks: Sequence[Block]) -> Parameters:
        return {name: self._constants[f"model.{name}"] for block in blocks for name in block.parameters}

    @cached_property
    def _by_columns(self) -> bool:
        return self.kind != "hessian" and columns.worth_it(self.attributed, self.dataset)

    @cached_property
    def _predictor(self) -> _Predictor:
        return _Predictor(self.attributed.problem, self.attributed.model)

    @cached_property
    def _constants(self) -> Parameters:
        return {f"model.{name}": tensor.detach() for name, tensor in self.attributed.model.named_parameters()}

    @cached_property
    def _recent(self) -> RecentBatches:
        return RecentBatches(lambda ids: self.attributed.load(self.dataset, ids))

    @cached_property
    def _width(self) -> int:
        """Bytes of activations per example and vector; found with one product of a single example, which shows what cannot be done."""
        first = self.attributed.load(self.dataset, [0])
        blocks = self.attributed.blocks[:1] if self.kind == "block_ggn" else self.attributed.blocks
        try:
            with warnings.catch_warnings(), _differentiable():
                # The first forward derivative of a process imports what torch itself has deprecated.
                warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
                multiply = self._hessian if self.kind == "hessian" else self._ggn
                next(multiply(blocks, first, [self._zeros(1, flat.total(blocks))]))
                return saved_bytes(lambda: self.attributed.problem.predict(self.attributed.model, first), self.attributed.model)
        except (RuntimeError, NotImplementedError) as error:
            raise InputError(
                f'torch.func cannot differentiate this model for curvature = "{self.kind}": {cause(error)}; '
                "`exclude` the layer, or use ekfac, which needs first derivatives alone"
            ) from error


class _Predictor(nn.Module):
    """Problem.predict as a module, so that functional_call can put other parameters into the model."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        super().__init__()
        self.problem, self.model = problem, model
        self.training = False

    def forward(self, batch: Batch) -> Tensor:
        """Outputs of the batch."""
        return self.problem.predict(self.model, batch)


class _PaddingIsConstant(TorchFunctionMode):
    """An embedding's padding row is no parameter: reverse mode leaves it out by itself, forward mode has to be told."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        if func is nn.functional.embedding:
            ids, weight, padding = _embedding(*args, **kwargs)
            if padding is not None:
                return torch.where((ids == padding % len(weight))[..., None], found.detach(), found)
        return found


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *_: Any, **__: Any) -> tuple[Tensor, Tensor, int | None]:
    return input, weight, padding_idx


@contextmanager
def _differentiable() -> Iterator[None]:
    """Attention as plain operations: the fused ones have no second or forward derivatives."""
    fused = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(fast_float32())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fused)
        torch.backends.mha.set_fastpath_enabled(False)
        yield


def _tangents(blocks: Sequence[Block], vectors: Tensor) -> Parameters:
    """Vectors (query, D) as tensors by parameter name, (query, ...)."""
    found: Parameters = {}
    for block, matrix in zip(blocks, flat.unflatten(blocks, vectors), strict=True):
        found.update(to_parameters(block, matrix))
    return found


def _flat(blocks: Sequence[Block], tensors: Mapping[str, Tensor]) -> Tensor:
    return flat.flatten(blocks, [to_matrix(block, dict(tensors)) for block in blocks])
