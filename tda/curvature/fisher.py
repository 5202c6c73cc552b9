"""The Fisher information as gradients of the outputs: which labels its per-example gradients are of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from tda.capture import Tape
from tda.curvature.labels import uniforms
from tda.problem import Batch, Problem

Fisher = Literal["exact", "sampled", "empirical"]


def seeds(problem: Problem, tape: Tape, batch: Batch, ids: Sequence[int], fisher: Fisher, seed: int) -> Iterator[tuple[Tensor, bool, bool]]:
    """(output gradient, is the first, is the last) for each column whose per-example gradients' outer products add up to the Fisher.

    "empirical": the data's labels. "sampled": labels drawn from the model, one draw per example, keyed by (seed, example id).
    "exact": the expectation over labels, by the columns of a square root of the likelihood's output Hessian.
    """
    likelihood, outputs = problem.likelihood, tape.precise
    if fisher == "empirical":
        yield tape.seed(likelihood.loss), True, True
    elif fisher == "sampled":
        drawn = likelihood.sample(outputs, batch.targets, uniforms(seed, ids, likelihood.draws(outputs)).to(outputs.device))
        yield tape.seed(getattr(likelihood, "sampled_loss", likelihood.loss), drawn), True, True
    else:
        columns = (column.to(tape.outputs.dtype) for column in likelihood.hessian_columns(outputs, batch.targets))
        column, first = next(columns), True
        for following in columns:
            yield column, first, False
            column, first = following, False
        yield column, first, True
