"""Is what is captured the truth? Two examples, each alone and together, before anything is computed from a model.

Output gradients are drawn at random: those of a well-learnt example's loss are nearly zero, and would test nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tda.attributed import Attributed
from tda.blocks import Block, example_gradients, to_matrix
from tda.capture import example
from tda.errors import InputError, cause
from tda.problem import Batch


def check_losses(attributed: Attributed, batch: Batch) -> None:
    """Raise InputError unless loss and measurement are one finite number per example that does not depend on the rest of the batch."""
    problem, size = attributed.problem, len(batch.targets)
    tape = attributed.tape(batch)
    values = {}
    for name, function in (("loss", problem.likelihood.loss), ("measurement", tape.measurement)):
        try:
            values[name] = function(tape.precise, batch.targets)
        except Exception as error:
            raise InputError(f"the {name} of a batch failed: {cause(error)}") from error
        if values[name].shape != (size,):
            shape = tuple(values[name].shape)
            raise InputError(
                f"the {name} must be one number per example, shape ({size},) for a batch of {size}, got {shape}; do not average"
            )
    tolerance = 1e-6 if attributed.dtype == torch.float64 else 2e-3
    for i in range(size):
        one = example(batch, i, size)
        alone = float(problem.likelihood.loss(_outputs(attributed, one).detach().double(), one.targets).sum())
        together = float(values["loss"][i])
        if not abs(together) < float("inf"):
            raise InputError(f"the loss of train example {i} is {together}; mend the example or the model's outputs")
        if abs(together - alone) > tolerance * (1 + abs(alone)):
            raise InputError(
                f"the loss of train example {i} is {alone:.6g} alone and {together:.6g} in a batch of {size}: "
                f"it depends on the other examples{_batch_statistics(attributed.model)}; "
                "use running statistics or per-example normalisation"
            )


def check_autocast(attributed: Attributed, batch: Batch) -> None:
    """Raise InputError unless the model can be computed in the dtype of its autocast, forwards and backwards."""
    kind = str(attributed.autocast).removeprefix("torch.")
    try:
        tape = attributed.tape(batch)
        for _ in tape.pairs(tape.seed(attributed.problem.likelihood.loss)):
            pass
    except (RuntimeError, NotImplementedError) as error:
        other = 'use "bfloat16", or leave it out' if kind == "float16" else "leave it out"
        raise InputError(
            f'autocast = "{kind}": the model cannot be computed so on {attributed.device.type}: {cause(error)}; {other}'
        ) from error


def gradient_errors(attributed: Attributed, batch: Batch) -> Iterator[tuple[Block, float, int]]:
    """For each block: the relative error of its captured per-example gradients against autograd's, and its positions per example."""
    size, tape = len(batch.targets), attributed.tape(batch)
    generator = torch.Generator().manual_seed(0)
    seed = torch.randn(tape.outputs.shape, generator=generator, dtype=torch.float64).to(tape.outputs)
    truths = [_truth(attributed, example(batch, i, size), seed[i : i + 1]) for i in range(size)]
    scale = max(float(torch.sqrt(sum((g.double().square().sum() for g in t.values()), seed.new_zeros(())))) for t in truths)
    for block, pairs in zip(attributed.blocks, tape.pairs(seed), strict=True):
        truth = torch.stack([to_matrix(block, t) for t in truths])
        captured = example_gradients(block, pairs) if pairs else torch.zeros_like(truth)
        error = float((captured - truth).norm() / (truth.norm() + 1e-6 * scale + 1e-30))
        yield block, error, max(sum(pair.positions for pair in pairs), 1)


def _truth(attributed: Attributed, one: Batch, seed: Tensor) -> dict[str, Tensor]:
    """d sum(outputs * seed) / d parameter for a batch of one."""
    parameters = dict(attributed.model.named_parameters())
    names = [n for block in attributed.blocks for n in block.parameters]
    outputs = _outputs(attributed, one)
    wanted = [parameters[n] for n in names]
    found: Sequence[Tensor | None] = torch.autograd.grad(outputs, wanted, seed.view_as(outputs), allow_unused=True)
    dense = [torch.zeros_like(p) if g is None else g.to_dense() for p, g in zip(wanted, found, strict=True)]
    return dict(zip(names, dense, strict=True))


def _outputs(attributed: Attributed, batch: Batch) -> Tensor:
    try:
        with torch.enable_grad():
            return attributed.problem.predict(attributed.model, batch)
    except Exception as error:
        raise InputError(
            f"predict(model, batch) failed on a single example: {cause(error)}"
            f"{_batch_statistics(attributed.model)}; use running statistics or per-example normalisation"
        ) from error


def _batch_statistics(model: nn.Module) -> str:
    """The modules that normalise by the batch they are in, as part of a sentence."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds) and module.running_mean is None]
    return f" (batch statistics in {', '.join(names)})" if names else ""
