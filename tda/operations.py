"""The operations whose per-example gradients we know: how each call's input and output gradient become rows.

One function per operation: `bind` reads the call's arguments, `rows` turns (input, output gradient) into the rows of a `Pair`.
Layout says where the batch axis of the call is; it was found by comparing two batch sizes (see `modules`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where examples are in a call's output: `axis`; `folded`: that axis is batch x positions (batch-major)."""

    axis: int = 0
    folded: bool = False


@dataclass
class Call:
    """One use of watched parameters in a forward pass."""

    op: str
    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)
    output: Tensor | None = None
    edge: Any = None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Call:
    return Call("linear", input, weight, bias)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Call | None:
    # transformers' Conv1D: a linear layer with the weight stored as (in, out).
    return Call("addmm", mat1, mat2, input) if beta == 1 and alpha == 1 and mat1.ndim == 2 and input.ndim == 1 else None


def _conv(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Call:
    return Call("conv", input, weight, bias, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups})


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Call | None:
    if max_norm is not None or scale_grad_by_freq:  # both make one example's gradient depend on the others or on updates
        return None
    padding = None if padding_idx is None or padding_idx < -len(weight) else padding_idx % len(weight)
    return Call("embedding", input, weight, None, {"padding_idx": padding})


def _layer_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Call:
    return Call("layer_norm", input, weight, bias, {"normal": lambda x: F.layer_norm(x, normalized_shape, eps=eps)})


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Call:
    return Call("rms_norm", input, weight, None, {"normal": lambda x: F.rms_norm(x, normalized_shape, eps=eps)})


def _group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Call:
    return Call("group_norm", input, weight, bias, {"normal": lambda x: F.group_norm(x, num_groups, eps=eps)})


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Call | None:
    if training or running_mean is None:  # batch statistics couple the examples of a batch: no per-example gradient exists
        return None
    return Call("batch_norm", input, weight, bias, {"normal": lambda x: F.batch_norm(x, running_mean, running_var, eps=eps)})


def _elementwise(op: str) -> Callable[..., Call | None]:
    def bind(input: Any, other: Any, *, alpha: float = 1) -> Call | None:
        if alpha != 1 or not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        x, w = (input, other) if isinstance(other, torch.nn.Parameter) else (other, input)
        return None if isinstance(x, torch.nn.Parameter) else Call(op, x, w, None)

    return bind


BINDERS: dict[str, Callable[..., Call | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    "conv1d": _conv,
    "conv2d": _conv,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply"), _elementwise("scale")),
    **dict.fromkeys(("add", "__add__", "__radd__"), _elementwise("shift")),
}

#: Operations whose parameters have a Kronecker structure; the others' are vectors.
MATRIX = frozenset({"linear", "addmm", "conv", "embedding"})


def fits(call: Call, layout: Layout, batch: int) -> bool:
    """Whether a call has its examples where `layout` says.

    Rows that are folded count only where they are a view of a tensor whose first axis is the batch: rows picked out by a mask, say, may
    by chance be a multiple of the batch, and belong to the examples in another way.
    """
    output, rows = call.output, call.input
    assert output is not None
    if not layout.folded:
        return output.ndim > layout.axis and output.shape[layout.axis] == batch
    base = getattr(rows, "_base", None)
    return base is not None and base.ndim > rows.ndim and base.shape[0] == batch and rows.shape[0] % batch == 0


def position_rows(x: Tensor, layout: Layout, batch: int) -> Tensor:
    """(..., features) with the batch axis where `layout` says -> (batch, positions, features)."""
    if layout.folded:
        return x.reshape(batch, -1, x.shape[-1])
    return x.movedim(layout.axis, 0).reshape(batch, -1, x.shape[-1])


def with_ones(rows: Tensor) -> Tensor:
    """Rows with a last feature 1 for the bias."""
    return F.pad(rows, (0, 1), value=1.0)


def linear_rows(call: Call, gradient: Tensor, layout: Layout, batch: int) -> tuple[Tensor, Tensor]:
    """left (1, batch, positions, out), right (1, batch, positions, in [+ 1])."""
    right = position_rows(call.input.detach(), layout, batch)
    right = right if call.bias is None else with_ones(right)
    return position_rows(gradient, layout, batch)[None], right[None]


def conv_rows(call: Call, gradient: Tensor, layout: Layout, batch: int) -> tuple[Tensor, Tensor]:
    """left (groups, batch, pixels, out / groups), right (groups, batch, pixels, in / groups * kernel [+ 1])."""
    assert call.weight is not None
    groups, kernel = int(call.options["groups"]), call.weight.shape[2:]
    patches = _patches(call.input.detach(), kernel, call.options)  # (batch, *pixels, channels, *kernel), not yet copied
    pixels, features = patches.shape[1 : 1 + len(kernel)], patches.shape[1 + len(kernel)] // groups * int(kernel.numel())
    right = patches.new_empty(batch, *pixels, groups, features + int(call.bias is not None))
    right[..., :features].unflatten(-1, (-1, *kernel)).copy_(patches.unflatten(1 + len(kernel), (groups, -1)))
    if call.bias is not None:
        right[..., features] = 1
    right = right.flatten(1, len(kernel)).permute(2, 0, 1, 3)
    return gradient.flatten(2).view(batch, groups, -1, right.shape[2]).permute(1, 0, 3, 2), right


def _patches(x: Tensor, kernel: torch.Size, options: dict[str, Any]) -> Tensor:
    """im2col as a view by strides: (batch, *pixels, channels, *kernel), features in the order of the weight."""
    dims = len(kernel)

    def each(value: Any) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)

    stride, dilation, padding = each(options["stride"]), each(options["dilation"]), options["padding"]
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if padding == "valid":
        sides = [(0, 0)] * dims
    elif padding == "same":
        sides = [(s // 2, s - s // 2) for s in spans]
    else:
        sides = [(p, p) for p in each(padding)]
    x = F.pad(x, [p for side in reversed(sides) for p in side]).contiguous()
    sizes = [(n - span - 1) // st + 1 for n, span, st in zip(x.shape[2:], spans, stride, strict=True)]
    b, c, *space = x.stride()
    strides = [b, *(s * st for s, st in zip(space, stride, strict=True)), c, *(s * d for s, d in zip(space, dilation, strict=True))]
    return x.as_strided([x.shape[0], *sizes, x.shape[1], *kernel], strides)


def embedding_rows(call: Call, gradient: Tensor, layout: Layout, batch: int) -> tuple[Tensor, Tensor]:
    """left (1, batch, positions, width): the output gradient, zero at the padding index; right: ids (batch, positions)."""
    ids = embedding_ids(call, layout, batch)
    left = position_rows(gradient, layout, batch)
    if call.options["padding_idx"] is not None:
        left = left.masked_fill((ids == call.options["padding_idx"])[..., None], 0.0)
    return left[None], ids


def embedding_ids(call: Call, layout: Layout, batch: int) -> Tensor:
    """The ids that an embedding was called with, (batch, positions)."""
    ids = call.input if call.input.shape[0] != 1 or batch == 1 else call.input.expand(batch, *call.input.shape[1:])
    return ids.reshape(batch, -1) if layout.folded else ids.movedim(layout.axis, 0).reshape(batch, -1)


def vector_gradient(call: Call, gradient: Tensor, layout: Layout, batch: int) -> Tensor:
    """Per-example gradient (batch, n) of a scale and shift, weight first: sum_t s_t * normalised_t and sum_t s_t."""
    parts = []
    for row, shape in _scaled_rows(call, gradient):
        # group_norm's and batch_norm's parameters lie along axis 1, not along the last ones
        channels = call.options.get("channels") or (call.op in ("group_norm", "batch_norm") and row.ndim > 2)
        parts.append(row.flatten(2).sum(2) if channels else _reduce(row, shape, layout, batch))
    return torch.cat([p.reshape(batch, -1) for p in parts], 1)


def vector_rows(call: Call, gradient: Tensor, layout: Layout, batch: int) -> Tensor | None:
    """The same position by position, (batch, positions, n); None where parameters do not lie along the last axes."""
    if call.options.get("channels") or call.op in ("group_norm", "batch_norm"):
        return None
    parts = [_positions(row, shape, layout, batch) for row, shape in _scaled_rows(call, gradient)]
    if any(1 in p.shape[2:] for p in parts):
        return None
    return torch.cat([p.flatten(2) for p in parts], 2)


def _scaled_rows(call: Call, gradient: Tensor) -> list[tuple[Tensor, torch.Size]]:
    """What is summed over positions for the weight and for the bias, shaped like the output, and their shapes."""
    if call.op in ("scale", "shift"):
        assert call.weight is not None
        return [(gradient * call.input.detach() if call.op == "scale" else gradient, call.weight.shape)]
    shape = next(t.shape for t in (call.weight, call.bias) if t is not None)
    rows = []
    if call.weight is not None:
        rows.append((gradient * call.options["normal"](call.input.detach()), shape))
    if call.bias is not None:
        rows.append((gradient, shape))
    return rows


def _positions(x: Tensor, shape: torch.Size, layout: Layout, batch: int) -> Tensor:
    """(batch, positions, *shape): `x` with the batch first and all axes between it and those of the parameter as one."""
    x = x.reshape(batch, -1, *x.shape[1:]) if layout.folded else x.movedim(layout.axis, 0)
    while len(shape) and shape[0] == 1:  # a leading 1 may stand at the batch axis itself, as in positions (1, tokens, width)
        shape = shape[1:]
    return x.reshape(batch, -1, *x.shape[x.ndim - len(shape) :])


def _reduce(x: Tensor, shape: torch.Size, layout: Layout, batch: int) -> Tensor:
    """Sum `x` over every axis but the batch to `shape` (aligned at the right, as broadcasting does)."""
    flat = _positions(x, shape, layout, batch).sum(1)
    while len(shape) and shape[0] == 1:
        shape = shape[1:]
    ones = [d + 1 for d, n in enumerate(shape) if n == 1]
    return flat.sum(ones, keepdim=True) if ones else flat
