"""Which parameters are attributed, and how: every parameter of a model becomes part of a block, or is named with the reason why not.

The forward pass is recorded for two and for three examples; where the shapes differ is the batch axis. Then each block's captured
per-example gradient is compared with autograd's on single examples. A block that differs is taken one example at a time instead; what
differs even then has no per-example gradient, and is refused. So nothing is attributed wrongly, and nothing is skipped silently.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tda.attributed import UNUSED, Attributed, Skipped
from tda.blocks import Block, vector_block
from tda.capture import Recorder
from tda.data import load_batch
from tda.device import device_of
from tda.errors import InputError, cause
from tda.operations import MATRIX, Call, Layout, fits
from tda.problem import Batch, Problem
from tda.selfcheck import check_losses, gradient_errors

#: A use of a parameter: the name of the bias with it, and the call as recorded for two and for three examples.
Use = tuple[str | None, Call, Call]


def inspect(
    problem: Problem, model: nn.Module, dataset: Any, *, modules: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> Attributed:
    """Cut `model` into blocks. `modules` and `exclude` are glob patterns over module or parameter names; a pattern takes what lies below.

    A word of `problem.groups(model)` stands for the modules that it names.

    Raises InputError where a pattern matches nothing, where nothing is left to attribute, where the loss is not one finite number per
    example, or where an example's loss depends on the others of its batch.
    """
    model.eval()
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise InputError(f'the model is {str(dtype).removeprefix("torch.")}, too coarse for gradients; set dtype = "float32" in the config')
    parameters = dict(model.named_parameters())
    chosen, skipped = _chosen(problem, model, modules, exclude)
    n = len(dataset)
    # The third example is the first again, so that padding to the longest of a batch changes no other axis.
    pair, triple = (load_batch(problem, dataset, [i % n for i in ids], dtype=dtype, device=device_of(model)) for ids in ((0, 1), (0, 1, 0)))
    few, more = (_record(problem, model, chosen, batch) for batch in (pair, triple))
    blocks, layouts = _classify(chosen, few, more)
    named = {name for block in blocks for name in block.parameters}
    hidden = _hidden(problem, model, {name: tensor for name, tensor in chosen.items() if name not in named}, pair)
    blocks += [_direct(chosen, name, "used out of sight of torch functions") for name in hidden]
    named |= set(hidden)
    skipped += [Skipped(n, p.numel(), UNUSED) for n, p in chosen.items() if n not in named]
    order = {name: i for i, name in enumerate(parameters)}
    blocks.sort(key=lambda block: order[block.parameters[0]])
    if not blocks:
        raise InputError(f"no parameter is left to attribute: {'; '.join(f'{s.name}: {s.reason}' for s in skipped[:5])}; widen `modules`")
    total = sum(p.numel() for p in parameters.values())
    attributed = Attributed(problem, model, tuple(blocks), layouts, tuple(skipped), total, dtype, few.outputs // 2)
    return _verified(attributed, pair)


def chosen_parameters(problem: Problem, model: nn.Module, *, modules: Sequence[str], exclude: Sequence[str]) -> dict[str, Tensor]:
    """The parameters that `inspect` would look at, by name; the model may be one without weights."""
    return _chosen(problem, model, modules, exclude)[0]


def _chosen(problem: Problem, model: nn.Module, modules: Sequence[str], exclude: Sequence[str]) -> tuple[dict[str, Tensor], list[Skipped]]:
    groups = problem.groups(model)
    modules, exclude = ([name for pattern in each for name in groups.get(pattern, (pattern,))] for each in (modules, exclude))
    return _select(dict(model.named_parameters()), modules, exclude)


def _select(parameters: Mapping[str, Tensor], modules: Sequence[str], exclude: Sequence[str]) -> tuple[dict[str, Tensor], list[Skipped]]:
    def matches(name: str, pattern: str) -> bool:
        parts = name.split(".")
        return any(fnmatchcase(".".join(parts[:k]), pattern) for k in range(1, len(parts) + 1))

    for pattern in (*modules, *exclude):
        if not any(matches(name, pattern) for name in parameters):
            near = difflib.get_close_matches(pattern, {n.rpartition(".")[0] or n for n in parameters}, n=3, cutoff=0.3)
            some = ", ".join(near or list(parameters)[:3]) or "a model that has parameters"
            raise InputError(f"pattern {pattern!r} matches no module or parameter; try e.g. {some}")
    chosen, skipped = {}, []
    for name, tensor in parameters.items():
        if not any(matches(name, p) for p in modules):
            skipped.append(Skipped(name, tensor.numel(), "not in `modules`"))
        elif any(matches(name, p) for p in exclude):
            skipped.append(Skipped(name, tensor.numel(), "in `exclude`"))
        elif not tensor.requires_grad:
            skipped.append(Skipped(name, tensor.numel(), "frozen (requires_grad is False)"))
        else:
            chosen[name] = tensor
    return chosen, skipped


def _record(problem: Problem, model: nn.Module, chosen: dict[str, Tensor], batch: Batch) -> Recorder:
    with torch.enable_grad(), Recorder(chosen, len(batch.targets)) as recorder:
        try:
            outputs = problem.predict(model, batch)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"predict(model, batch) failed on a batch of {len(batch.targets)}: {cause(error)}; "
                "batch is (inputs, targets) as the dataset yields them"
            ) from error
    if not isinstance(outputs, Tensor):
        raise InputError(f"predict(model, batch) must return a tensor of outputs, got {type(outputs).__name__}; define Problem.predict")
    problem.likelihood.check(outputs.detach(), batch.targets)
    recorder.outputs = outputs.numel()
    return recorder  # type: ignore[no-any-return]  # the mode's __enter__ is untyped


def _hidden(problem: Problem, model: nn.Module, unseen: Mapping[str, Tensor], batch: Batch) -> list[str]:
    """Which of the parameters that no torch function was seen to use have a gradient all the same, as in an autograd function."""
    if not unseen:
        return []
    with torch.enable_grad():
        outputs = problem.predict(model, batch)
        if not outputs.requires_grad:
            return []
        found: Sequence[Tensor | None] = torch.autograd.grad(outputs.sum(), list(unseen.values()), allow_unused=True)
    return [name for name, gradient in zip(unseen, found, strict=True) if gradient is not None]


def _classify(chosen: dict[str, Tensor], few: Recorder, more: Recorder) -> tuple[list[Block], dict[str, Layout]]:
    uses: dict[str, list[Use]] = {}
    same = len(few.calls) == len(more.calls)
    for (weight, bias, a), (_, _, b) in zip(few.calls, more.calls, strict=same):
        uses.setdefault(weight or bias or "", []).append((bias, a, b))
    owners: dict[str, set[str]] = {}
    for key, calls in uses.items():
        for bias, _, _ in calls:
            owners.setdefault(bias or "", set()).add(key)
    blocks, layouts = [], {}
    unknown = {**few.unknown, **more.unknown}
    modules = [key.rpartition(".")[0] for key in (*uses, *unknown)]
    for key, calls in uses.items():
        module, _, last = key.rpartition(".")
        # A block is called as its module unless the module has another one.
        name = module if module and last in ("weight", "bias") and modules.count(module) == 1 else key
        block, layout, reason = _block(chosen, name, key, calls)
        names = {key} | {bias for bias, _, _ in calls if bias}
        if bad := names & unknown.keys():
            reason = f"also used by {unknown[min(bad)]}"
        elif any(len(owners[bias]) > 1 for bias in names - {key} if bias in owners):
            reason = "its bias is shared with another layer"
        elif not same:
            reason = "called a different number of times for another batch"
        if reason or block is None or layout is None:
            unknown.update(dict.fromkeys(names, reason or "an unknown form"))
        else:
            blocks.append(block)
            layouts[block.name] = layout
    blocks += [_direct(chosen, name, why) for name, why in unknown.items()]
    return blocks, layouts


def _block(chosen: dict[str, Tensor], name: str, key: str, calls: Sequence[Use]) -> tuple[Block | None, Layout | None, str]:
    """The block of the parameter `key`, where its examples are, or why it cannot be one."""
    ops, biases = {a.op for _, a, _ in calls}, {bias for bias, _, _ in calls}
    layouts = {_layout(a, b) for _, a, b in calls}
    if len({bias for bias, a, _ in calls if a.op != "embedding"}) > 1:
        return None, None, "used with and without its bias"
    if len(layouts) > 1 or None in layouts:
        return None, None, "its batch axis cannot be found"
    bias = next((b for b in biases if b), None)
    names = tuple(n for n in ((None if key == bias else key), bias) if n)
    shapes = tuple(tuple(chosen[n].shape) for n in names)
    if ops & MATRIX:
        block = _matrix_block(name, key, bias, shapes, chosen[key], calls)
    else:
        block = vector_block(name, min(ops), None if key == bias else key, bias, shapes) if len(ops) == 1 else None
    return block, layouts.pop(), "" if block else f"used by {' and '.join(sorted(ops))}"


def _matrix_block(
    name: str, key: str, bias: str | None, shapes: tuple[tuple[int, ...], ...], weight: Tensor, calls: Sequence[Use]
) -> Block | None:
    ops, extra = {a.op for _, a, _ in calls}, int(bias is not None)
    if ops == {"embedding"}:
        return Block(name, "embedding", "embedding", "embedding", 1, weight.shape[1], weight.shape[0], key, None, shapes)
    if ops == {"addmm"}:
        return Block(name, "linear", "transposed", "kronecker", 1, weight.shape[1], weight.shape[0] + extra, key, bias, shapes)
    if ops <= {"linear", "embedding"}:
        kind = "linear" if ops == {"linear"} else "tied linear and embedding"
        return Block(name, kind, "linear", "kronecker", 1, weight.shape[0], weight.shape[1] + extra, key, bias, shapes)
    groups = {int(a.options.get("groups", 0)) for _, a, _ in calls}
    if ops == {"conv"} and len(groups) == 1:
        g = groups.pop()
        return Block(name, "conv", "conv", "kronecker", g, weight.shape[0] // g, int(weight[0].numel()) + extra, key, bias, shapes)
    return None


def _layout(few: Call, more: Call) -> Layout | None:
    a, b = few.output, more.output
    assert a is not None
    assert b is not None
    if a.ndim != b.ndim:
        return None
    axes = [d for d in range(a.ndim) if a.shape[d] != b.shape[d]]
    if len(axes) != 1:
        return None
    d = axes[0]
    if (a.shape[d], b.shape[d]) == (2, 3):
        # A scale or shift along the batch axis itself would be shared by position in the batch.
        reach = few.weight.ndim if few.weight is not None and few.op in ("scale", "shift") and not few.options.get("channels") else 0
        return Layout(d) if d < a.ndim - reach or few.weight is None or (few.weight.shape[d - a.ndim] == 1 and d == 0) else None
    folded = Layout(0, folded=True)
    return folded if few.op in ("addmm", "linear") and fits(few, folded, 2) and fits(more, folded, 3) else None


def _direct(chosen: Mapping[str, Tensor], name: str, why: str) -> Block:
    reason = f"one example at a time: {why if ' ' in why else f'used by {why}'}"
    return vector_block(name, "direct", name, None, (tuple(chosen[name].shape),), direct=True, reason=reason)


def _verified(attributed: Attributed, batch: Batch) -> Attributed:
    """The same with every block's captured gradient checked against autograd, and its number of positions filled in.

    A block whose gradient differs becomes direct, and is checked again; a direct block that differs is refused.
    """
    check_losses(attributed, batch)
    tolerance = 1e-6 if attributed.dtype == torch.float64 else 2e-3
    parameters = dict(attributed.model.named_parameters())
    blocks = []
    for block, error, positions in gradient_errors(attributed, batch):
        if error <= tolerance:
            blocks.append(replace(block, positions=positions))
        elif block.direct:
            raise InputError(
                f"{block.name} has no per-example gradient ({block.reason}; in a batch it differs by {error:.1e}); `exclude` it"
            )
        else:
            why = f"its captured gradient differs from autograd's by {error:.1e}"
            blocks += [_direct(parameters, name, why) for name in block.parameters]
    again = replace(attributed, blocks=tuple(blocks))
    changed = sum(b.direct for b in blocks) != sum(b.direct for b in attributed.blocks)
    return _verified(again, batch) if changed else again
