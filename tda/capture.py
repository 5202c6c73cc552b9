"""One forward pass of a batch, from which the per-example gradients of every block are read off.

The calls that use watched parameters are seen through a torch function mode, not through module hooks: a module that is called
several times, a weight that is tied, a subclass with its own forward or a functional call are all the same thing to it, and an
operation that we do not know is noticed instead of missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from tda.blocks import Block, Pair, to_matrix
from tda.errors import InputError
from tda.loss_scale import powers, scaled, unscaled
from tda.operations import (
    BINDERS,
    MATRIX,
    Call,
    Layout,
    conv_rows,
    embedding_ids,
    embedding_rows,
    fits,
    linear_rows,
    vector_gradient,
    vector_rows,
)
from tda.problem import Batch, Problem
from tda.recompute import recomputing


class Recorder(TorchFunctionMode):
    """While active, lists every known use of the watched parameters (`calls`), and the unknown ones by name (`unknown`)."""

    def __init__(self, watched: Mapping[str, Tensor], batch: int) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in watched.items()}
        self._batch = batch
        self.calls: list[tuple[str | None, str | None, Call]] = []
        self.unknown: dict[str, str] = {}
        self.outputs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = (*args, *kwargs.values())
        used = [x for x in values if isinstance(x, Tensor) and id(x) in self._names]
        nested = [x for v in values if isinstance(v, (list, tuple)) for x in v if isinstance(x, Tensor) and id(x) in self._names]
        if not used and not nested:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        call = BINDERS[name](*args, **kwargs) if name in BINDERS and not nested else None
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad and id(leaf) not in self._names for leaf in tree_leaves(result)):
            return result  # no gradient passes through this use: the values are only looked at
        if call is not None and self._covers(call, used):
            return self._record(call, result)
        for tensor in (*used, *nested):
            self.unknown.setdefault(self._names[id(tensor)], name)
        return result

    def _covers(self, call: Call, used: list[Tensor]) -> bool:
        known = {id(t) for t in (call.weight, call.bias) if t is not None}
        return all(id(t) in known for t in used)

    def _record(self, call: Call, output: Tensor) -> Tensor:
        if call.op == "embedding" and output.ndim == 3 and output.shape[0] == 1 and self._batch > 1:
            # Position embeddings (1, tokens, width) are broadcast over the batch: expanded here, each example has its own gradient.
            output = output.expand(self._batch, -1, -1)
        weight, bias = (None if t is None else self._names.get(id(t)) for t in (call.weight, call.bias))
        if weight is None and bias is not None and call.op in MATRIX:
            # Only the bias is watched: it is a shift of the output.
            call = Call("shift", call.input, call.bias, None, {"channels": call.op == "conv"})
            weight, bias = bias, None
        call.weight, call.bias = (call.weight if weight else None), (call.bias if bias else None)
        call.output, call.edge = output, get_gradient_edge(output)
        self.calls.append((weight, bias, call))
        return output


class Tape:
    """A recorded forward pass: `outputs` (batch, ...), and per-example gradients for any gradient of the outputs."""

    def __init__(
        self,
        problem: Problem,
        model: nn.Module,
        blocks: Sequence[Block],
        layouts: dict[str, Layout],
        batch: Batch,
        unused: Sequence[str],
        autocast: torch.dtype | None = None,
        recompute: bool = False,
    ) -> None:
        self._scale: float | None = None
        self._ids: Sequence[int] | None = None
        self._autocast, self._recompute = autocast, recompute
        self._problem, self._model, self._blocks, self._layouts, self._batch = problem, model, blocks, layouts, batch
        self.size = size = len(batch.targets)
        parameters = dict(model.named_parameters())
        watched = {n: parameters[n] for n in (*(n for b in blocks if not b.direct for n in b.parameters), *unused)}
        mask = problem.mask(batch)
        self._mask = None if mask is None else mask.reshape(size, -1)
        with torch.enable_grad(), Recorder(watched, size) as recorder:
            self.outputs = self._predict(batch)
        problem.likelihood.check(self.outputs.detach(), batch.targets)
        self._calls: dict[str, list[Call]] = {}
        for weight, bias, call in recorder.calls:
            self._calls.setdefault(weight or bias or "", []).append(call)
        self._check(recorder)
        for _, _, call in recorder.calls:  # only its shape is asked for from here on: what autograd does not need is let go
            assert call.output is not None
            call.output = call.output.detach().new_zeros(()).expand(call.output.shape)

    def scaling(self, scale: float, ids: Sequence[int] | None) -> Tape:
        """The same, losses being scaled before its backward passes (`tda.loss_scale`). ids: of the examples, for messages."""
        self._scale, self._ids = scale, ids
        return self

    def _predict(self, batch: Batch) -> Tensor:
        """The outputs, in the model's own dtype also where layers are computed in a shorter one."""
        parameter = next(self._model.parameters())
        short = torch.autocast(parameter.device.type, dtype=self._autocast) if self._autocast else nullcontext()
        with short, recomputing(self._model) if self._recompute else nullcontext():
            outputs = self._problem.predict(self._model, batch)
        return outputs if self._autocast is None else outputs.to(parameter.dtype)

    def _whole(self, call: Call, gradient: Tensor) -> tuple[Call, Tensor]:
        """A call and the gradient of its output, of which sums are taken, in the model's own dtype."""
        if self._autocast is None:
            return call, gradient
        dtype = self.outputs.dtype
        inputs = call.input.detach().to(dtype) if call.input.is_floating_point() else call.input
        return replace(call, input=inputs), gradient.to(dtype)

    def _check(self, recorder: Recorder) -> None:
        """What inspection found must hold for this batch too: a branch that only some examples take would be lost silently."""
        keys = {block.weight or block.bias or "": block for block in self._blocks if not block.direct}
        for name, operation in recorder.unknown.items():
            raise InputError(f"some examples use {name} by {operation}, which the first ones do not; put it in `exclude`")
        for key, calls in self._calls.items():
            if key not in keys:
                raise InputError(f"some examples use {key}, which the first ones do not; put it in `exclude`")
            layout = self._layouts.get(keys[key].name, Layout())
            if not all(fits(call, layout, self.size) for call in calls):
                raise InputError(f"some examples use {key} in another layout than the first ones (packed rows?); put it in `exclude`")

    def measurement(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The problem's measurement; one that the user wrote is given outputs in the model's own dtype."""
        own = type(self._problem).measurement is not Problem.measurement
        return self._problem.measurement(outputs.to(self.outputs.dtype) if own else outputs, targets)

    @property
    def precise(self) -> Tensor:
        """The outputs, detached, in float64: of the gradient p - 1 of a well-learnt example, float32 would leave little but rounding."""
        return self.outputs.detach().double()

    def seed(self, function: Callable[[Tensor, Tensor], Tensor], targets: Tensor | None = None) -> Tensor:
        """d sum_b function(outputs, targets)_b / d outputs, shaped like the outputs; `targets` are the batch's own by default."""
        outputs = self.precise.requires_grad_()
        with torch.enable_grad():
            value = function(outputs, self._batch.targets if targets is None else targets)
            return torch.autograd.grad(value.sum(), outputs)[0].to(self.outputs.dtype)

    def pairs(self, seed: Tensor, *, last: bool = True, apart: bool = False, layers: slice | None = None) -> Iterator[list[Pair]]:
        """For each block in order, the pairs whose summed products are the per-example gradients of sum(outputs * seed).

        last: whether the graph may be freed. apart: whether scales and shifts keep their positions, too. layers: of these blocks alone.
        Blocks are made one at a time, so that only one layer's patches are in memory.
        """
        blocks = self._blocks if layers is None else self._blocks[layers]
        keys = {block.weight or block.bias or "" for block in blocks}
        calls = [call for key, calls in self._calls.items() if key in keys for call in calls]
        by = None if self._scale is None else powers(seed, self._scale)
        seed = seed if by is None else scaled(seed, by)
        edges = [call.edge for call in calls]
        found: Sequence[Tensor | None] = (
            torch.autograd.grad(self.outputs, edges, seed, retain_graph=not last, allow_unused=True) if edges else ()
        )
        gradients = {id(call): _or_zeros(gradient, call.output) for call, gradient in zip(calls, found, strict=True)}
        direct = self._direct([block for block in blocks if block.direct], seed)
        for block in blocks:
            pairs = [direct[block.name]] if block.direct else self._read(block, gradients, apart=apart)
            yield pairs if by is None or self._scale is None else [unscaled(pair, by, self._ids, self._scale) for pair in pairs]

    def _read(self, block: Block, gradients: dict[int, Tensor], *, apart: bool) -> list[Pair]:
        calls = self._calls.get(block.weight or block.bias or "", [])
        layout = self._layouts.get(block.name, Layout())
        if block.form == "vector" and apart:
            rows = [vector_rows(*self._whole(call, gradients[id(call)]), layout, self.size) for call in calls]
            if all(row is not None for row in rows):
                return [Pair(row[None], row.new_ones(1, *row.shape[:2], 1)) for row in rows if row is not None]
        if block.form == "vector":
            total = sum(vector_gradient(*self._whole(call, gradients[id(call)]), layout, self.size) for call in calls)
            return [_column(total)] if isinstance(total, Tensor) else []
        return [self._matrix_pair(block, *self._whole(call, gradients[id(call)]), layout) for call in calls]

    def _matrix_pair(self, block: Block, call: Call, gradient: Tensor, layout: Layout) -> Pair:
        side: Any = "left"
        if call.op == "conv":
            left, right = conv_rows(call, gradient, layout, self.size)
        elif call.op == "embedding":
            left, right = embedding_rows(call, gradient, layout, self.size)
            if block.form != "embedding":  # tied with a linear layer: rows of the weight are the one-hot side
                side, one_hot = "right", left.new_zeros(*left.shape[:3], block.out).scatter_(-1, right[None, ..., None], 1.0)
                left, right = one_hot, torch.nn.functional.pad(left, (0, block.in_ - left.shape[-1]))
        else:
            left, right = linear_rows(call, gradient, layout, self.size)
        mask = self._mask if self._mask is not None and self._mask.shape[1] == left.shape[2] else None
        if call.op == "embedding" and call.options["padding_idx"] is not None:  # the padding index uses no parameter: it is no position
            real = embedding_ids(call, layout, self.size) != call.options["padding_idx"]
            mask = real if mask is None else mask & real
        return Pair(left, right, side, mask)

    def inputs(self, block: Block) -> Tensor:
        """What a block is given, (batch, features), the mean over its positions; without the 1 that stands for a bias.

        Raises InputError where the block takes no rows: an embedding, a scale, an operation that we do not know.
        """
        calls = self._calls.get(block.weight or block.bias or "", [])
        if block.direct or block.form in ("vector", "embedding") or block.groups > 1 or any(call.op == "embedding" for call in calls):
            raise InputError(f"layer {block.name} ({block.kind}) has no rows of inputs; name a linear or convolutional layer")
        zeros = {id(call): torch.zeros_like(call.output) for call in calls if call.output is not None}
        layout = self._layouts.get(block.name, Layout())
        pairs = [self._matrix_pair(block, *self._whole(call, zeros[id(call)]), layout) for call in calls]
        rows = torch.cat([pair.right[0] for pair in pairs], 1)[..., : block.in_ - int(block.bias is not None)]
        marks = [pair.left.new_ones(self.size, pair.positions) if pair.mask is None else pair.mask.to(rows.dtype) for pair in pairs]
        weight = torch.cat(marks, 1)[..., None]
        return (rows * weight).sum(1) / weight.sum(1).clamp(min=1)

    def _direct(self, blocks: Sequence[Block], seed: Tensor) -> dict[str, Pair]:
        """Per-example gradients, by block name, of blocks whose operations we do not know: one forward and backward pass per example."""
        if not blocks:
            return {}
        parameters = dict(self._model.named_parameters())
        names = [name for block in blocks for name in block.parameters]
        rows: dict[str, list[Tensor]] = {block.name: [] for block in blocks}
        for i in range(self.size):
            one = example(self._batch, i, self.size)
            with torch.enable_grad():
                outputs = self._predict(one)
                found: Sequence[Tensor | None] = torch.autograd.grad(
                    outputs, [parameters[n] for n in names], seed[i : i + 1], allow_unused=True
                )
            whole = {n: _or_zeros(g, parameters[n]) for n, g in zip(names, found, strict=True)}
            for block in blocks:
                rows[block.name].append(to_matrix(block, whole).flatten())
        return {name: _column(torch.stack(each)) for name, each in rows.items()}


def _or_zeros(gradient: Tensor | None, like: Tensor | None) -> Tensor:
    """What autograd found; zeros where the outputs do not depend on it."""
    if gradient is not None:
        return gradient
    assert like is not None
    return torch.zeros_like(like)


def _column(gradient: Tensor) -> Pair:
    """(batch, n) gradients as left (1, batch, 1, n), right = 1."""
    return Pair(gradient[None, :, None, :], gradient.new_ones(1, len(gradient), 1, 1))


def example(batch: Batch, i: int, size: int) -> Batch:
    """Example i of a batch, as a batch of one."""
    return Batch(
        tree_map(lambda leaf: leaf[i : i + 1] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size else leaf, batch.inputs),
        batch.targets[i : i + 1],
    )
