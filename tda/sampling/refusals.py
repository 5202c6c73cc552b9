"""Models that cannot be sampled, refused before the first step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tda.attributed import Attributed
from tda.data import batches
from tda.errors import InputError, cause
from tda.problem import Batch
from tda.recipe import rows

#: Examples on which the model is tried.
TRIED = 8


def check_model(attributed: Attributed, data: Batch, size: int) -> None:
    """Raise InputError unless the model, in eval mode, has one finite loss per example that is the same each time it is asked.

    size: examples of a step, which must not depend on each other.
    """
    for leaf in tree_flatten(data.inputs)[0]:
        if not isinstance(leaf, Tensor) or not leaf.ndim or len(leaf) != len(data.targets):
            raise InputError(
                f"the inputs hold a {type(leaf).__name__} that is not a tensor with one row per example; chains need tensors: convert it "
                "in the dataset or Problem.collate"
            )
    for name, module in attributed.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:  # noqa: SLF001
            raise InputError(
                f"{name} ({type(module).__name__}) lacks running statistics, so that the losses of a batch of {size} depend on each other: "
                "set track_running_stats=True, or use LayerNorm or GroupNorm"
            )
    some = rows(data, torch.arange(min(TRIED, len(data.targets)), device=data.targets.device))
    once, again = _losses(attributed, some), _losses(attributed, some)
    if not torch.equal(once, again):
        raise InputError(
            f"the loss of train example {int((once != again).nonzero()[0])} is random in eval mode; chains need a loss that is a function "
            "of the weights: switch the randomness off when module.training is False"
        )


def _losses(attributed: Attributed, batch: Batch) -> Tensor:
    model, problem = attributed.model.eval(), attributed.problem
    try:
        with torch.no_grad():
            found = problem.likelihood.loss(problem.predict(model, batch), batch.targets)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"the loss of a training batch failed in eval mode, in which chains run: {cause(error)}; make the model give its outputs in "
            "eval mode too"
        ) from error
    if found.shape != (len(batch.targets),):
        raise InputError(
            f"the loss must be one number per example, shape ({len(batch.targets)},), got {tuple(found.shape)}; do not average"
        )
    for (i,) in batches(range(len(found)), 1):
        if not bool(found[i].isfinite()):
            raise InputError(
                f"the loss of train example {i} is {float(found[i])} at the checkpoint; mend the example or the model's outputs"
            )
    return found
