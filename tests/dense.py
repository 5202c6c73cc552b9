"""An independent dense reference: curvature blocks and scores in float64, one example at a time, written from the formulas alone.

It shares no code with the library and takes no shortcut: per-example gradients come from plain autograd, layer inputs and output
gradients from forward hooks, convolution patches from padding and `unfold`, Kronecker products and inverses are formed in full.
Use it on small models: a block with n parameters costs n x n memory.

    passes = dense.record(model, loss, train, queries, blocks, labels=dense.categorical_labels)
    scores = dense.influence(passes, blocks, "ekfac", damping=1e-3)          # (Q, N), the library's sign: -(1/N) g_q^T M^-1 g_i

Legend. N training examples, Q queries, P positions of one example (tokens, pixels, repeated calls of the module).
A layer's gradient is a matrix (o, j): o outputs, j inputs, the bias being the last input, which is constant 1.
Flattened row by row it has n = o * j entries, so that S kron A, with S (o, o) and A (j, j), is its curvature.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Example = tuple[Any, Any]  # (inputs, target) without a batch axis
Loss = Callable[[Tensor, Any], Tensor]  # (outputs (1, ...), target (1, ...)) -> (1,)
Labels = Callable[[Tensor, Any], list[tuple[float, Any]]]  # the labels an expectation runs over, as (weight, target (1, ...))
Damping = float | Mapping[str, float] | Literal["heuristic"]


@dataclass(frozen=True)
class Block:
    """One diagonal block of the curvature.

    kind: "linear", "transposed" (weight stored as (in, out)), "conv" (1-d or 2-d) and "embedding" have Kronecker structure and name the
    modules that share one weight, usually one; "full" (the exact n x n block) and "diagonal" name parameters, which are concatenated.
    group: which group of a grouped convolution; each group is a block of its own.
    """

    kind: Literal["linear", "transposed", "conv", "embedding", "full", "diagonal"]
    names: tuple[str, ...]
    group: int = 0

    @property
    def structured(self) -> bool:
        """Whether the block has Kronecker factors."""
        return self.kind not in {"full", "diagonal"}

    @property
    def key(self) -> str:
        """The name under which a mapping of dampings holds this block's value."""
        return "+".join(self.names) + (f"#{self.group}" if self.group else "")


@dataclass(frozen=True)
class Backward:
    """One backward pass: one example under one label, which stands in the expectation with `weight`.

    gradients: parameter name -> gradient. inputs, outputs: module name -> one entry per call, the layer's input and the gradient of its
    output, both with a batch axis of 1. mask: (P,), which positions are real; None where all are.
    """

    weight: float
    gradients: dict[str, Tensor]
    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]
    mask: Tensor | None


@dataclass(frozen=True)
class Passes:
    """All backward passes that the curvature and the scores are made of: under the data's labels, the Fisher's, and of the queries."""

    model: nn.Module
    data: list[Backward]
    fisher: list[Backward]
    queries: list[Backward]


# Labels: what the expectation in F = E[g g^T] runs over.


def data_label(outputs: Tensor, target: Any) -> list[tuple[float, Any]]:
    """Empirical Fisher: the label that the data has. With labels drawn from the model put in their place: the sampled Fisher."""
    del outputs
    return [(1.0, target)]


def categorical_labels(outputs: Tensor, target: Any) -> list[tuple[float, Any]]:
    """Exact expectation over the classes: class c with weight p_c. outputs: (1, C)."""
    return [(float(p), torch.full_like(target, c)) for c, p in enumerate(outputs[0].softmax(-1))]


def token_labels(outputs: Tensor, target: Tensor, ignore: int = -100) -> list[tuple[float, Any]]:
    """Exact expectation over independent tokens. outputs: (1, P, V), target: (1, P).

    The joint labels number V^P, but g is a sum of independent terms of mean zero, one per position, so that E[g g^T] is the sum over
    the positions of the expectation with all other positions ignored. The same holds for sums over positions of s s^T.
    """
    probability = outputs[0].softmax(-1)
    chosen = []
    for t, c in itertools.product(range(target.shape[1]), range(outputs.shape[-1])):
        if target[0, t] != ignore:
            alone = torch.full_like(target, ignore)
            alone[0, t] = c
            chosen.append((float(probability[t, c]), alone))
    return chosen


def gaussian_labels(outputs: Tensor, target: Tensor) -> list[tuple[float, Any]]:
    """Exact expectation for the loss 0.5 ||y - f||^2 with y ~ N(f, I): E[(y - f)(y - f)^T] = I = sum_k e_k e_k^T, so y = f + e_k."""
    del target
    size = outputs.numel()
    return [(1.0, outputs + direction.reshape(outputs.shape)) for direction in torch.eye(size, dtype=outputs.dtype)]


def bernoulli_labels(outputs: Tensor, target: Tensor) -> list[tuple[float, Any]]:
    """Exact expectation over all 2^K labels of K independent Bernoulli outputs given as logits (1, K) or (1,)."""
    probability = torch.sigmoid(outputs).reshape(-1)
    chosen = []
    for bits in itertools.product((0.0, 1.0), repeat=outputs.numel()):
        label = torch.tensor(bits, dtype=outputs.dtype)
        weight = torch.prod(torch.where(label > 0, probability, 1 - probability))
        chosen.append((float(weight), label.reshape(outputs.shape).to(target.dtype)))
    return chosen


# Recording: one forward and one backward pass per (example, label).


def record(
    model: nn.Module,
    loss: Loss,
    train: Iterable[Example],
    queries: Iterable[Example],
    blocks: Sequence[Block],
    *,
    labels: Labels = data_label,
    drawn: Sequence[Any] | None = None,
    measurement: Loss | None = None,
    predict: Callable[[nn.Module, Any], Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
) -> Passes:
    """Run every pass that is needed. The model must be in eval mode and float64.

    drawn: (N,) labels to use for the Fisher in place of the data's (without batch axis). measurement: of the queries, default the loss.
    masks: (N,) boolean masks (P,): the positions that count in A.
    """
    train = list(train)
    modules = sorted({name for block in blocks if block.structured for name in block.names})
    call = predict or (lambda model, inputs: model(inputs))

    def run(function: Loss, inputs: Any, target: Any, weight: float, mask: Tensor | None) -> Backward:
        return _backward(model, modules, lambda: function(call(model, inputs), target), weight, mask)

    data, fisher = [], []
    for i, (one, label) in enumerate(train):
        mask = None if masks is None else masks[i]
        inputs, target = _batch(one), _batch(label)
        data.append(run(loss, inputs, target, 1.0, mask))
        with torch.no_grad():
            outputs = call(model, inputs)
        for weight, y in labels(outputs, target if drawn is None else _batch(drawn[i])):
            fisher.append(run(loss, inputs, y, weight, mask))
    asked = [run(measurement or loss, _batch(inputs), _batch(target), 1.0, None) for inputs, target in queries]
    return Passes(model, data, fisher, asked)


def _backward(model: nn.Module, modules: Sequence[str], forward: Callable[[], Tensor], weight: float, mask: Tensor | None) -> Backward:
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    outputs: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., Tensor]:
        def keep(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name].append(args[0].detach().clone())
            output.retain_grad()
            outputs[name].append(output)
            return output.clone()  # an activation that works in place must not change what is kept

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    model.zero_grad(set_to_none=True)
    try:
        torch.autograd.backward(forward().sum())
    finally:
        for handle in handles:
            handle.remove()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    kept = {name: [torch.zeros_like(y) if y.grad is None else y.grad for y in calls] for name, calls in outputs.items()}
    return Backward(weight, gradients, inputs, kept, mask)


def _batch(value: Any) -> Any:
    """The value with a batch axis of 1, inside dictionaries and tuples too."""
    if isinstance(value, dict):
        return {key: _batch(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_batch(item) for item in value)
    return torch.as_tensor(value)[None]


# One layer's rows: activations a (P, j), output gradients s (P, o), and its gradient (o, j).


def activations(model: nn.Module, block: Block, one: Backward) -> Tensor:
    """The inputs a of the block's modules with the constant 1 of the bias last, all calls: (P, j)."""
    return torch.cat([_activation(model.get_submodule(name), block, x) for name in block.names for x in one.inputs[name]])


def _activation(module: Any, block: Block, x: Tensor) -> Tensor:
    if block.kind == "embedding":
        hot = functional.one_hot(x.reshape(-1), module.num_embeddings).to(module.weight.dtype)
        if module.padding_idx is not None:
            hot[:, module.padding_idx] = 0
        return hot
    rows = _patches(module, x, block.group) if block.kind == "conv" else x.reshape(-1, x.shape[-1])
    return rows if module.bias is None else torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)


def _patches(conv: Any, x: Tensor, group: int) -> Tensor:
    """The patches under the kernel, for the channels of one group: (P, channels * kernel), one row per output position."""
    if isinstance(conv.padding, str):
        total = [d * (k - 1) if conv.padding == "same" else 0 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in conv.padding]
    flat = [p for pair in reversed(pads) for p in pair]  # pad wants the last axis first
    x = functional.pad(x, flat, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    share = x.shape[1] // conv.groups
    x = x[:, group * share : (group + 1) * share]
    kernel, dilation, stride = conv.kernel_size, conv.dilation, conv.stride
    if x.ndim == 3:  # a 1-d convolution is a 2-d one of height 1
        x, kernel, dilation, stride = x[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
    return functional.unfold(x, kernel, dilation=dilation, stride=stride)[0].T


def output_gradients(model: nn.Module, block: Block, one: Backward) -> Tensor:
    """The gradients s with respect to the outputs of the block's modules, all calls: (P, o)."""
    rows = []
    for name in block.names:
        module: Any = model.get_submodule(name)
        for s in one.outputs[name]:
            if block.kind == "conv":
                share = s.shape[1] // module.groups
                rows.append(s[0, block.group * share : (block.group + 1) * share].flatten(1).T)
            else:
                rows.append(s.reshape(-1, s.shape[-1]))
    return torch.cat(rows)


def gradient(model: nn.Module, block: Block, one: Backward) -> Tensor:
    """The block's gradient as autograd gives it for the parameters themselves: (o, j), or (1, n) for a full or diagonal block."""
    if not block.structured:
        return torch.cat([one.gradients[name].reshape(-1) for name in block.names])[None]
    names = {id(p): name for name, p in model.named_parameters()}
    module: Any = model.get_submodule(block.names[0])
    weight = one.gradients[names[id(module.weight)]]
    weight = weight.T if block.kind in {"transposed", "embedding"} else weight.flatten(1)
    if getattr(module, "bias", None) is not None:
        weight = torch.cat([weight, one.gradients[names[id(module.bias)]][:, None]], 1)
    share = len(weight) // getattr(module, "groups", 1)
    return weight[block.group * share : (block.group + 1) * share]


# Curvature.


def factors(passes: Passes, block: Block) -> tuple[Tensor, Tensor]:
    """K-FAC's factors: S = sum_{i,t} E[s s^T] / N (o, o) and A = sum_{i,t} a a^T / (positions in all) (j, j)."""
    rows = []
    for one in passes.data:
        a = activations(passes.model, block, one)
        rows.append(a if one.mask is None else a[one.mask.reshape(-1)])
    a = torch.cat(rows)
    s = torch.cat([one.weight**0.5 * output_gradients(passes.model, block, one) for one in passes.fisher])
    return s.T @ s / len(passes.data), a.T @ a / len(a)


def fisher(passes: Passes, block: Block) -> Tensor:
    """The block's exact Fisher F = (1/N) sum_i E[g_i g_i^T]: (n, n)."""
    g = torch.stack([one.weight**0.5 * gradient(passes.model, block, one).reshape(-1) for one in passes.fisher])
    return g.T @ g / len(passes.data)


def eigenbasis(passes: Passes, block: Block) -> tuple[Tensor, Tensor]:
    """Eigenvectors U_S (o, o) and U_A (j, j) in columns; an embedding's one-hot inputs keep the identity as U_A."""
    S, A = factors(passes, block)
    U_A = torch.eye(len(A), dtype=A.dtype) if block.kind == "embedding" else torch.linalg.eigh(A)[1]
    return torch.linalg.eigh(S)[1].contiguous(), U_A.contiguous()  # torch.kron views its factors


def ekfac_eigenvalues(passes: Passes, block: Block) -> tuple[Tensor, Tensor]:
    """EK-FAC's Lambda = diag(U^T F U), (n,), and its basis U = U_S kron U_A, (n, n)."""
    U = torch.kron(*eigenbasis(passes, block))
    return torch.diagonal(U.T @ fisher(passes, block) @ U).clone(), U


def curvature(passes: Passes, block: Block, method: str) -> Tensor:
    """The block's curvature (n, n) under "kfac", "ekfac" or "fisher"; blocks without Kronecker structure are the same in all."""
    if block.kind == "diagonal":
        return torch.diag(torch.diagonal(fisher(passes, block)))
    if block.kind == "full" or method == "fisher":
        return fisher(passes, block)
    if method == "kfac":
        return torch.kron(*factors(passes, block))
    if method == "ekfac":
        eigenvalues, U = ekfac_eigenvalues(passes, block)
        return U @ torch.diag(eigenvalues) @ U.T
    raise ValueError(f"method must be 'kfac', 'ekfac' or 'fisher', got {method!r}")


def damping_value(C: Tensor, block: Block, damping: Damping) -> float:
    """The absolute damping of a block; "heuristic" is 0.1 times the mean eigenvalue of its curvature C."""
    if damping == "heuristic":
        return 0.1 * float(torch.trace(C)) / len(C)
    return damping[block.key] if isinstance(damping, Mapping) else damping


def inverse(C: Tensor, damping: float) -> Tensor:
    """(C + damping I)^-1, formed in full: (n, n). Its error in the scores was 3e-10 at damping 1e-6 of the mean eigenvalue."""
    formed: Tensor = torch.linalg.inv(C + damping * torch.eye(len(C), dtype=C.dtype))
    return formed


# Scores.


def gradients(passes: Passes, block: Block, which: Literal["data", "queries"]) -> Tensor:
    """The flattened gradients of the training examples (N, n) or of the queries (Q, n)."""
    chosen = passes.data if which == "data" else passes.queries
    return torch.stack([gradient(passes.model, block, one).reshape(-1) for one in chosen])


def scores(passes: Passes, block: Block, inverse: Tensor) -> Tensor:
    """The block's share of influence[q, i] = -(1/N) g_q^T M^-1 g_i: (Q, N), given M^-1 (n, n)."""
    return -gradients(passes, block, "queries") @ inverse @ gradients(passes, block, "data").T / len(passes.data)


def influence(passes: Passes, blocks: Sequence[Block], method: str, damping: Damping = "heuristic") -> Tensor:
    """The influence (Q, N) under "graddot", "kfac", "ekfac" or "fisher", summed over the blocks."""
    total = torch.zeros(len(passes.queries), len(passes.data), dtype=torch.float64)
    for block in blocks:
        if method == "graddot":
            M_inverse = torch.eye(gradient(passes.model, block, passes.data[0]).numel(), dtype=torch.float64)
        else:
            C = curvature(passes, block, method)
            M_inverse = inverse(C, damping_value(C, block, damping))
        total += scores(passes, block, M_inverse)
    return total
