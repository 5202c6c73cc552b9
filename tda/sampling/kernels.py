"""What vmap and the fast kernels leave slow, put right on the way: a mode under which models run, copies or one.

- torch's vmap turns a Linear layer on (B, T, I) into a product of B T matrices, each with its own copy of the weights; here it is one
  product per copy of the model. Attention, which it cannot batch at all, runs on copies and examples in one batch.
- oneDNN, where it is measured to keep float32, multiplies twice as fast as the default library, but the fused attention built on it is
  ten times slower: short sequences take attention in plain products, long ones leave oneDNN for its time.

Shape suffixes: C copies, B examples, H heads, T tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from tda.products import fast_float32, plain_float32

#: Queries x keys of an attention that is computed in plain products: few enough that they stay in the cache.
SHORT = 1 << 16


class Kernels(TorchFunctionMode):
    """The mode. `with kernels.forwards():` around a model's forward pass, `with kernels.backwards():` around its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.long = False  # a long attention was seen: its backward pass must not meet oneDNN either

    @contextmanager
    def forwards(self) -> Iterator[None]:
        """Forward passes."""
        with ExitStack() as stack:
            stack.enter_context(fast_float32())
            stack.enter_context(self)
            yield

    @contextmanager
    def backwards(self) -> Iterator[None]:
        """The backward pass of what ran in `forwards`."""
        with nullcontext() if self.long else fast_float32():
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace linear layers and attention; anything else as it is."""
        if func is F.linear and not kwargs and _batched(args[1]):
            return _apply(_Linear, args[0], args[1], args[2] if len(args) > 2 else None)
        if func is torch.addmm and not kwargs and _batched(args[2]) and args[0].ndim == 1:
            return _apply(_Linear, args[1], args[2].transpose(0, 1), args[0])
        if func is F.scaled_dot_product_attention:
            return self._attention(Attention(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _attention(self, asked: Attention) -> Tensor:
        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            one = asked._replace(query=query, key=key, value=value, attn_mask=mask)
            if _plain(one):
                return _causal(one.query, one.key, one.value, one.scale)
            if one.query.device.type != "cpu":
                how: Any = nullcontext()
            elif one.query.shape[-2] * one.key.shape[-2] <= SHORT:
                how = sdpa_kernel(SDPBackend.MATH)
            else:
                self.long, how = True, plain_float32()
            with how:
                return F.scaled_dot_product_attention(*one[:6], scale=one.scale, enable_gqa=one.enable_gqa)

        if any(_batched(tensor) for tensor in asked[:3]):
            return _apply(_Attention, attend, *asked[:4])
        return attend(*asked[:4])


class Attention(NamedTuple):
    """What F.scaled_dot_product_attention is called with."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def _plain(asked: Attention) -> bool:
    """Whether it is short causal attention on a CPU and nothing else."""
    query = asked.query
    short = query.ndim == 4 and query.shape == asked.key.shape and query.shape[2] ** 2 <= SHORT and query.device.type == "cpu"
    return short and asked.is_causal and asked.attn_mask is None and not asked.dropout_p and not asked.enable_gqa


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention, (B, H, T, .): four kernels, since no token is without one to look at."""
    tokens, channels = query.shape[2:]
    later_TT = query.new_full((tokens, tokens), -torch.inf).triu_(1)
    q, k, v = (part.flatten(0, 1) for part in (query, key, value))
    weights = torch.baddbmm(later_TT, q, k.transpose(1, 2), alpha=channels**-0.5 if scale is None else scale).softmax(-1)
    found: Tensor = torch.bmm(weights, v).unflatten(0, query.shape[:2])
    return found


def _apply(function: Any, *inputs: Any) -> Tensor:
    found: Tensor = function.apply(*inputs)
    return found


def _batched(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and torch._C._functorch.is_batchedtensor(tensor)  # noqa: SLF001  (it has no public name)


def _front(tensor: Tensor, dim: int | None, copies: int) -> Tensor:
    """The copies' axis in front, where there is none by expansion."""
    return tensor.expand(copies, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


class _Vmapped(torch.autograd.Function):
    """A function that vmap is told how to batch; autograd sees the operations within."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing: never differentiated as a whole."""


class _Linear(_Vmapped):
    """x (..., I), weight (O, I), bias (O,) or None -> (..., O)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One copy."""
        return F.linear(x, weight, bias)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        """Copies: one batched product."""
        x, weight_COI = _front(x, in_dims[0], info.batch_size), _front(weight, in_dims[1], info.batch_size)
        flat_CNI = x.reshape(len(x), -1, x.shape[-1])
        if bias is None:
            found = torch.bmm(flat_CNI, weight_COI.transpose(1, 2))
        else:
            found = torch.baddbmm(_front(bias, in_dims[2], info.batch_size)[:, None], flat_CNI, weight_COI.transpose(1, 2))
        return found.view(*x.shape[:-1], -1), 0


class _Attention(_Vmapped):
    """attend on (B, H, T, .), mask broadcast to (B, H, T, T) or None."""

    @staticmethod
    def forward(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """One copy."""
        return attend(query, key, value, mask)

    @staticmethod
    def vmap(info: Any, in_dims: Any, attend: Callable[..., Tensor], *tensors: Tensor | None) -> tuple[Tensor, int]:
        """Copies are further examples."""
        query, key, value, mask = tensors
        assert query is not None
        assert key is not None
        assert value is not None
        heads = [_front(part, dim, info.batch_size).flatten(0, 1) for part, dim in zip((query, key, value), in_dims[1:4], strict=True)]
        if mask is not None and (in_dims[4] is not None or (mask.ndim == 4 and len(mask) > 1)):
            mask = _front(mask, in_dims[4], info.batch_size)
            if mask.ndim < 5:  # without examples: each copy's is the same for all of them
                mask = mask.reshape(len(mask), *([1] * (5 - mask.ndim)), *mask.shape[1:])
            mask = mask.expand(-1, heads[0].shape[0] // info.batch_size, *mask.shape[2:]).flatten(0, 1)
        return attend(*heads, mask).unflatten(0, (info.batch_size, -1)), 0
