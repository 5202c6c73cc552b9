"""Mean shift: no gradients, but models that are retrained on random subsets (d-TDA; Mlodozeniec et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tda.data import length
from tda.directions import Direction
from tda.errors import InputError
from tda.evaluation.mean_shift import mean_shift
from tda.evaluation.subsets import subset_size
from tda.methods.method import Method
from tda.methods.work import Fit, Made, Work
from tda.problem import can_fit

if TYPE_CHECKING:
    from tda.attributed import Attributed
    from tda.capture import Tape


class Dtda(Method):
    """influence[q, i] = alpha (E[f_q | i in S] - E[f_q | i not in S]) over models trained on random subsets S of alpha N examples.

    alpha turns the effect of an example with weight 1 / (alpha N) in its subset's mean loss into that of one with weight 1/N, the
    library's unit. subsets: how many; seeds: models of each (more subsets are worth more than more seeds). They are drawn from the run's
    seed, apart from those that `tda evaluate` judges by; the checkpoint plays no part.
    """

    name: Literal["dtda"] = "dtda"
    alpha: float = Field(default=0.5, gt=0, lt=1)
    subsets: int = Field(default=200, ge=3)
    seeds: int = Field(default=1, ge=1)
    stochastic: ClassVar[bool] = True
    noise: ClassVar[str] = "subsets and training seeds of the models it retrains, keyed by the run's seed"
    of_weights: ClassVar[bool] = False
    takes_gradients: ClassVar[bool] = False

    @property
    def fits(self) -> tuple[Fit, ...]:
        """The retrained models' measurements."""
        return (Fit("retraining", f"{self.alpha} {self.subsets} {self.seeds}"),)

    def check(self, attributed: Attributed) -> None:
        """InputError where the problem cannot train, or alpha leaves nothing in or out."""
        if not can_fit(attributed.problem):
            name = type(attributed.problem).__name__
            raise InputError(f"dtda retrains the model, and {name} has neither fit nor recipe; define one of them, or leave dtda out")
        subset_size(length(attributed.problem.train_data(), "train"), self.alpha)

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """None: the scores themselves are what is kept."""
        ((truth,),) = work.curvature
        shift = self.alpha * mean_shift(truth.masks[0], truth.measurement[0][..., list(work.query_ids)])
        return Made([], kept={"influence": torch.from_numpy(shift).to(work.attributed.dtype)})

    def direct(self, kept: Mapping[str, Tensor], fits: Sequence[Any] = ()) -> Callable[[Attributed, Tape, Sequence[int]], Tensor]:
        """The columns of a batch."""
        return lambda _attributed, _tape, ids: kept["influence"][:, torch.tensor(list(ids))]
