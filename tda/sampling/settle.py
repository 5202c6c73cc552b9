"""The numbers that chains take where the options leave them open: "auto" becomes a number that follows from the checkpoint.

localization = damping x n_beta, where a damping is given; else the least that the draws can mix:
the slowest direction forgets in 2 / (step_size localization) steps, a DRAWS_IN_MODE-th of draws x thinning
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tda.attributed import Attributed
from tda.errors import InputError
from tda.sampling.diagnostics import ESS
from tda.sampling.options import Sampling
from tda.sampling.sampler import FLOOR
from tda.sampling.tuning import DRAWS_IN_MODE, PART, Curvature, Tuned, default_n_beta, tune
from tda.solvers.operator import Operator
from tda.solvers.power import extreme_eigenvalues

#: The curvature is that of so many training examples at most, evenly drawn: its largest eigenvalue is wanted to a few percent.
MOST_EXAMPLES = 4096
#: Options of a fit that no path depends on, or that are settled here.
_OPEN = ("step_size", "n_beta", "localization", "damping", "tokens")
#: Of the steps that there are, so many count, so that rounding does not ask for one more.
MARGIN = 0.98
#: Effective draws are judged by the worst of some hundred series, which is estimated at half of what they have.
WORST = 2.0
#: A damping for where there is none: `tune` asks for one above 0.
_NONE = 1e-30


@dataclass(frozen=True)
class Settled:
    """sampling: every option a number. told: JSON: sigma_max, bound, damping, reasons, a warning or "", and what else might be chosen."""

    sampling: Sampling
    told: dict[str, Any]


def given(options: Mapping[str, Any], step_size: float = 1.0, n_beta: float = 1.0, localization: float = 1.0) -> Sampling:
    """The options of a fit of chains, and a seed, as a Sampling: where one is "auto" it takes the number given here.

    Raises:
        InputError: a number is out of its range.
    """
    chosen = {"step_size": step_size, "n_beta": n_beta, "localization": localization}
    found: dict[str, Any] = {key: value for key, value in options.items() if key not in _OPEN}
    found |= {key: chosen[key] if options[key] == "auto" else options[key] for key in chosen}
    return Sampling(**found)


def settle(attributed: Attributed, dataset: Any, options: Mapping[str, Any], *, batch_size: int) -> Settled:
    """Settle the options of a fit. The same every time. batch_size: examples of one linearisation.

    Raises:
        InputError: a number is "auto", and products with the curvature cannot be had, or it is 0.
    """
    examples = len(dataset)
    n_beta = default_n_beta(examples, _batch(options)) if options["n_beta"] == "auto" else float(options["n_beta"])
    opened = "auto" in (options["step_size"], options["localization"])
    try:
        found = _tuned(attributed, dataset, options, n_beta, batch_size)
    except InputError as error:
        if opened:
            raise InputError(f"{error}; or give step_size and localization numbers, which need no curvature") from error
        sampling = given(options, n_beta=n_beta)
        return Settled(
            sampling, {"reasons": [f"as given; the curvature is not known: {error}"], "warning": "", "parameters": _count(attributed)}
        )
    localization = found.localization if options["localization"] == "auto" else float(options["localization"])
    sampling = given(options, found.step_size, n_beta, localization)
    told = {"sigma_max": found.sigma_max, "bound": found.bound, "damping": localization / n_beta, "reasons": _reasons(found, options)}
    told |= {"suggested": {name: getattr(found, name) for name in ("burn_in", "draws", "thinning")}, "parameters": _count(attributed)}
    return Settled(sampling, told | {"warning": _warning(sampling, found.bound)})


def _tuned(attributed: Attributed, dataset: Any, options: Mapping[str, Any], n_beta: float, batch_size: int) -> Tuned:
    examples = len(dataset)
    some = range(0, examples, -(-examples // MOST_EXAMPLES))
    kind = "ggn" if hasattr(attributed.problem.likelihood, "hessian_product") else "hessian"
    operator = Operator(attributed, dataset, kind, batch_size)  # type: ignore[arg-type]

    def product(vectors: Tensor) -> Tensor:
        return operator.product(vectors, some)

    like = torch.empty(0, dtype=torch.float64, device=next(attributed.model.parameters()).device)
    # At a minimum gradients, and so V, are small beside FLOOR: P is nearly this everywhere, and never above.
    scale = 1 / FLOOR if options["sampler"] == "rmsprop" else 1.0
    if options["localization"] != "auto":
        damping = max(float(options["localization"]) / n_beta, _NONE)
    elif options["damping"] is not None:
        damping = options["damping"]
    else:
        _, sigma_max, _ = extreme_eigenvalues(product, operator.size, like=like)
        damping = max(_least(options, n_beta * sigma_max, scale) / n_beta, _NONE)
    preconditioner = None if scale == 1 else torch.full((operator.size,), scale, dtype=like.dtype, device=like.device)
    return tune(
        Curvature(product, operator.size, preconditioner, like=like),
        examples=examples,
        damping=damping,
        n_beta=None if options["n_beta"] == "auto" else n_beta,
        draws=options["draws"],
        batch_size=_batch(options),
        times=MARGIN * seen(options),
    )


def _batch(options: Mapping[str, Any]) -> int | None:
    """Examples of a step; None: all."""
    return None if options["batch_size"] == "full" else int(options["batch_size"])


def _least(options: Mapping[str, Any], stiffness: float, scale: float) -> float:
    """The least localization whose slowest direction a chain sees often enough; stiffness: n_beta sigma_max."""
    steps = MARGIN * options["draws"] * options["thinning"]
    if options["step_size"] != "auto":
        return float(2 * seen(options) / (options["step_size"] * scale * steps))
    # From step_size = PART x 4 / (scale (stiffness + localization)), so that scale falls out. Too few steps mix nothing but the prior.
    return float(stiffness / max(2 * PART * steps / seen(options) - 1, 1.0))


def seen(options: Mapping[str, Any]) -> float:
    """How many times a chain should see its slowest direction forget: two such times are worth one independent draw."""
    return max(DRAWS_IN_MODE, 2 * WORST * ESS / int(options["chains"]))


def _reasons(found: Tuned, options: Mapping[str, Any]) -> list[str]:
    """A sentence for each number; that of a damping which nobody gave says how it was found."""
    if options["localization"] != "auto" or options["damping"] is not None:
        return list(found.reasons)
    mine = (
        f"damping = {found.damping:.4g}: the least for which {options['draws'] * options['thinning']} steps (draws x thinning) see the "
        f"slowest direction {seen(options):.0f} times; less damping needs as many times more steps."
    )
    return [mine if reason.startswith("damping = ") else reason for reason in found.reasons]


def _warning(sampling: Sampling, bound: float) -> str:
    if sampling.step_size < bound:
        return ""
    return (
        f"step_size {sampling.step_size:.3g} is not below the stability bound {bound:.3g}: the stiffest direction diverges; "
        f'lower it, or leave it out ("auto")'
    )


def _count(attributed: Attributed) -> int:
    return sum(block.size for block in attributed.blocks)
