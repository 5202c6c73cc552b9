"""Training data attribution: which training examples made a model do what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tda.errors import InputError
from tda.likelihoods import Bernoulli, Categorical, Gaussian, TokenCategorical
from tda.measurements import absolute_error, margin
from tda.problem import Batch, Problem
from tda.recipe import Recipe

if TYPE_CHECKING:
    from tda.results import list_runs, open_run
    from tda.study import open_study

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "InputError",
    "Problem",
    "Recipe",
    "TokenCategorical",
    "__version__",
    "absolute_error",
    "list_runs",
    "margin",
    "open_run",
    "open_study",
]


def __getattr__(name: str) -> Any:
    # xarray and pandas take most of a second to import: workers that only compute do without.
    if name in ("open_run", "list_runs"):
        from tda import results

        return getattr(results, name)
    if name == "open_study":
        from tda.study import open_study

        return open_study
    raise AttributeError(f"module 'tda' has no attribute {name!r}")
