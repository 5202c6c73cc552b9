"""Copies of a model whose steps and evaluations a compiler has made one program of: what lies between the products is then nearly free.

The model runs once on pretended tensors, which records its operations (so that it may be any Python code that does not look at a
number), and torch's compiler fuses them. Copies advance one after another by the same program: a chain's numbers do not depend on its
neighbours at all. The first call takes seconds to half a minute; `worth_compiling` says when that is earned back. Shape suffixes: C
chains (or any copies), D numbers of a model that move, B examples of a batch.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tda.attributed import Attributed
from tda.errors import InputError, cause
from tda.likelihoods import TokenCategorical
from tda.problem import Batch
from tda.sampling.ensembles import Gradient, OneByOne
from tda.sampling.kernels import SHORT, Attention, Kernels
from tda.sampling.options import Sampling
from tda.stacked import Predict

#: Multiplications and additions of a group of chains that take minutes: so much, and a quarter saved is more than a compiler takes.
WORTH = 1e13
#: What a compiled number may differ by from the model's own, relative to the largest: rounding, and what it sums up to. Some models
#: compute a norm in float32 whatever their dtype.
APART = {torch.float64: 1e-5, torch.float32: 1e-4}
#: Programs: (weights (D,), inputs, targets) -> tensors.
Program = Callable[[Tensor, Batch], list[Tensor]]
#: (outputs (M, B, ...), targets (B, ...)) -> values of the examples by their names.
Values = Callable[[Tensor, Tensor], dict[str, Tensor]]
#: (weights (1, D), batch) -> the same.
Evaluation = Callable[[Tensor, Batch], dict[str, Tensor]]


def worth_compiling(sampling: Sampling, numbers: int, data: Batch, likelihood: Any) -> bool:
    """Whether "auto" compiles: on a CPU, where a C++ compiler is there and a group of chains has work for minutes, counted, not timed."""
    tokens = data.targets.shape[1] if isinstance(likelihood, TokenCategorical) else 1
    examples = len(data.targets)
    seen = 3 * sampling.steps * sampling.batch(examples) + sampling.draws * examples
    work = 2.0 * numbers * tokens * seen * min(sampling.together, sampling.chains)
    return work >= WORTH and data.targets.device.type == "cpu" and compiler() is not None


def compiler() -> str | None:
    """The C++ compiler that torch would take."""
    from torch._inductor import config

    return next((each for each in config.cpp.cxx if each and shutil.which(each)), None)


class Compiled(OneByOne):
    """Copies one after another, by compiled programs."""

    def __init__(self, attributed: Attributed, data: Batch, size: int) -> None:
        """size: examples of a step's batch.

        Raises:
            InputError: no compiler, or the model cannot be compiled, or not to the same gradients.
        """
        super().__init__(attributed, "")
        self.how = "compiled"
        if self.center().device.type == "cpu" and compiler() is None:
            raise InputError("no C++ compiler was found (g++ or clang++)")
        some = Batch(*(tree_map(lambda leaf: leaf[:size], part) for part in data))
        center = self.center()
        self._step = self.program(self._gradient_of, center, some)
        found, loss = self._step(center, some)
        truth, losses = torch.empty_like(center)[None], center.new_empty(1)
        super().gradient(center[None], truth)(Batch(*(tree_map(lambda leaf: leaf[None], part) for part in some)), losses)
        if said := apart([found, loss], [truth[0], losses[0]], center.dtype):
            raise InputError(f"compiled, {said}")

    def _outputs_of(self, weights_D: Tensor, batch: Batch) -> Tensor:
        wrapped = Predict(self.problem, self.model)
        return wrapped.outputs(self.named(weights_D), batch.inputs, batch.targets)

    def _gradient_of(self, weights_D: Tensor, batch: Batch) -> list[Tensor]:
        leaf = weights_D.detach().requires_grad_()
        with torch.enable_grad():
            loss = self.likelihood.loss(self._outputs_of(leaf, batch), batch.targets).mean()
            (found,) = torch.autograd.grad(loss, leaf, materialize_grads=True)
        return [found, loss.detach()]

    def gradient(self, weights: Tensor, into: Tensor) -> Gradient:
        """By the program of a step."""

        def gradient(batch: Batch, losses: Tensor) -> None:
            for c, (weights_D, into_D) in enumerate(zip(weights, into, strict=True)):
                one = Batch(*(tree_map(lambda leaf, c=c: leaf[c], part) for part in batch))
                found, loss = self._step(weights_D, one)
                into_D.copy_(found)
                losses[c] = loss

        return gradient

    def evaluation(
        self, values: Callable[[Tensor, Tensor], dict[str, Tensor]], some: Batch
    ) -> Callable[[Tensor, Batch], dict[str, Tensor]]:
        """The program of weights (1, D) and a batch like `some` to what `values` has of outputs (1, B, ...) and targets.

        Raises:
            InputError: it cannot be compiled, or not to the same values.
        """
        names: list[str] = []

        def of(weights_D: Tensor, batch: Batch) -> list[Tensor]:
            with torch.no_grad():
                found = values(self._outputs_of(weights_D, batch)[None], batch.targets)
            names[:] = found
            return list(found.values())

        center = self.center()
        program = self.program(of, center, some)
        with torch.no_grad(), self.kernels.forwards():
            truth = of(center, some)
        if said := apart(program(center, some), truth, center.dtype):
            raise InputError(f"compiled, {said}")
        return lambda weights, batch: dict(zip(names, program(weights[0], batch), strict=True))

    def program(self, function: Program, weights_D: Tensor, some: Batch) -> Program:
        """A function of these shapes, compiled.

        Raises:
            InputError: it looks at a number, or the compiler failed.
        """
        leaves, kind = tree_flatten(tuple(some))

        def flat(weights_D: Tensor, *leaves: Tensor) -> list[Tensor]:
            return function(weights_D, Batch(*tree_unflatten(list(leaves), kind)))

        kernels = _Recorded()
        try:
            made = _made(flat, [weights_D, *leaves], kernels)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the model cannot be compiled: {cause(error)}") from error

        def run(weights_D: Tensor, batch: Batch) -> list[Tensor]:
            with torch.no_grad(), self.kernels.backwards():
                return made(weights_D, *tree_flatten(tuple(batch))[0])

        return run


def apart(found: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype) -> str:
    """What differs, in words; empty where numbers are equal up to the rounding of a model of that dtype."""
    for one, other in zip(found, truth, strict=True):
        most = float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)) if one.shape == other.shape else torch.inf
        if not most < APART.get(dtype, 1e-2):
            return f"numbers differ by {most:.1e} from the model's own"
    return ""


def _made(flat: Callable[..., list[Tensor]], inputs: list[Tensor], kernels: Kernels) -> Callable[..., list[Tensor]]:
    import torch._inductor as inductor
    from torch._inductor import config
    from torch.fx.experimental.proxy_tensor import make_fx

    # Other processes for the compiler would be left behind by a worker that is killed.
    with warnings.catch_warnings(), config.patch(compile_threads=1):
        warnings.simplefilter("ignore")
        with kernels:
            graph = make_fx(flat, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        if kernels.long:
            raise InputError("attention over so many tokens is faster as it is")
        # The compiler may lay tensors out otherwise than they were recorded, where a view is none.
        for node in graph.graph.nodes:
            if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):  # noqa: SLF001
                node.target = torch.ops.aten.reshape.default
        graph.recompile()
        with _in_order():
            made: Any = inductor.compile(graph, list[Any](inputs))
            made(*inputs)
    return cast("Callable[..., list[Tensor]]", made)


@contextmanager
def _in_order() -> Iterator[None]:
    """What is added up at places that numbers say is left to torch's kernels: the compiler's threads would do it in any order."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)


class _Recorded(Kernels):
    """Kernels as they are to be recorded: gradients of embeddings stay one operation, since the compiler's adds in any order of threads."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Embeddings replaced."""
        if func is F.embedding and (found := _embedding(*args, **(kwargs or {}))) is not None:
            return found
        return super().__torch_function__(func, types, args, kwargs)

    def _attention(self, asked: Attention) -> Tensor:
        """Attention in plain products, which is what the compiler can fuse; it is not for long sequences."""
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = asked
        self.long |= query.shape[-2] * key.shape[-2] > SHORT or dropout_p > 0
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
        products = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = products.new_ones(products.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            products = products.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else products + attn_mask
        # Safe: a token that sees nothing has 0, as torch's own attention has it.
        found: Tensor = torch.ops.aten._safe_softmax(products, -1) @ value  # noqa: SLF001  (the only name it has)
        return found


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    if not weight.requires_grad or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    rows: Any = _Embedding
    found: Tensor = rows.apply(weight, input, -1 if padding_idx is None else padding_idx % len(weight))
    return found


class _Embedding(torch.autograd.Function):
    """weight[ids]; the row `padding` has no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int) -> Tensor:
        """Rows."""
        ctx.save_for_backward(ids)
        ctx.words, ctx.padding = len(weight), padding
        found: Tensor = torch.ops.aten.embedding(weight, ids)
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Their gradients added up, in the order of the examples."""
        (ids,) = ctx.saved_tensors
        return _embedding_gradient(gradient, ids, ctx.words, ctx.padding), None, None


@torch.library.custom_op("tda::embedding_gradient", mutates_args=())
def _embedding_gradient(gradient: Tensor, ids: Tensor, words: int, padding: int) -> Tensor:
    found: Tensor = torch.ops.aten.embedding_dense_backward(gradient, ids, words, padding, False)
    return found


@_embedding_gradient.register_fake
def _(gradient: Tensor, ids: Tensor, words: int, padding: int) -> Tensor:  # noqa: ARG001  (the shape alone)
    return gradient.new_empty(words, gradient.shape[-1])
