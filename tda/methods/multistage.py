"""Multi-stage influence (2505.05017): which examples of the pre-training made the fine-tuned model do that?

    w_ft = argmin L_ft(w) + (a/2) ||w - w_pt||^2        u = (H_ft + (a + damping) I)^-1 grad f_q(w_ft)
    influence[q, fine-tuning example i]  = -(1/N_ft) u^T grad l_i(w_ft)
    influence[q, pre-training example i] = -(1/N_pt) a u^T (H_pt + lambda I)^-1 grad l_i(w_pt)

The second line is the chain rule at the two optima: a pre-training example moves w_pt by -(1/N_pt) (H_pt + lambda I)^-1 grad l_i, and w_pt
moves w_ft by a (H_ft + a I)^-1. A pre-training that was itself pulled to earlier weights passes on likewise, as often as there are stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tda.carried import Unmatched
from tda.curvature.fisher import Fisher
from tda.directions import Direction
from tda.methods.ekfac import EKFAC
from tda.methods.iterative import CG, Astra
from tda.methods.kfac import KFAC
from tda.methods.method import Method
from tda.methods.options import SaneDamping
from tda.methods.work import Fit, Made, Work
from tda.self_products import Own
from tda.solvers.operator import Curvature

if TYPE_CHECKING:
    from tda.attributed import Attributed

_KINDS: dict[str, type[KFAC | CG | Astra]] = {"ekfac": EKFAC, "kfac": KFAC, "cg": CG, "astra": Astra}
_SOLVERS = ("cg", "astra")


def _number(value: object, good: bool, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or not good:
        raise ValueError(f"{wanted}, got {value!r}")
    return float(value)


def _proximity(value: object) -> object:
    wanted = "proximity must be a finite number > 0, the a of (a/2) ||w - w_pt||^2 in the fine-tuning's objective"
    return _number(value, isinstance(value, int | float) and value > 0, wanted)


def _damping(value: object) -> object:
    return _number(value, isinstance(value, int | float) and value >= 0, "damping must be a finite number >= 0, added to the proximity")


Proximity = Annotated[float, BeforeValidator(_proximity)]


class Pretraining(BaseModel):
    """A `[methods.pretraining]` table: the stage that the model was fine-tuned from.

    problem, problem_options, checkpoint: as a run's; without a checkpoint the run trains it. modules, exclude: the run's where they are
    not given. damping: lambda, a number >= 0 or "heuristic", the default. pretraining, proximity: the stage before this one, in the same
    form, and the coefficient by which this one was pulled to it; damping is then added to the proximity, and is 0 by default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    problem: str = Field(min_length=1)
    problem_options: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str | None = Field(default=None, min_length=1)
    modules: list[str] | None = Field(default=None, min_length=1)
    exclude: list[str] | None = None
    damping: SaneDamping | None = None
    proximity: Proximity | None = None
    pretraining: Pretraining | None = None

    @model_validator(mode="after")
    def _is_pulled_to_what_is_there(self) -> Self:
        if self.pretraining is not None and self.proximity is None:
            raise ValueError("proximity is missing: with a stage before it, say how strongly this one was pulled there")
        if self.pretraining is None and self.proximity is not None:
            raise ValueError(
                f"proximity = {self.proximity} pulls this stage to one before it; add its [pretraining] table, or leave this out"
            )
        if self.pretraining is not None and self.damping == "heuristic":
            raise ValueError('damping = "heuristic" is for the first stage; give a number that is added to the proximity, or leave it out')
        return self


@dataclass(frozen=True)
class Stage:
    """A stage before the one that queries are asked of.

    name: "pretraining", and "pretraining.pretraining" for the one before that: the path of its table. proximity: a, by which the stage
    after it was pulled to its weights. inverse: the method that takes (H + damping I)^-1, with this stage's damping.
    """

    name: str
    table: Pretraining
    proximity: float
    inverse: Method


class Multistage(Method):
    """Influence of fine-tuning examples in run.influence, of those of every earlier stage in run.influence_on("pretraining").

    proximity: a. damping: added to it in the inverse of the fine-tuned stage. inverse: "ekfac", "kfac", "cg" or "astra", for all
    stages; fisher as for these, curvature, tolerance and max_steps for the last two. unmatched: what becomes of parameters that one of
    two stages lacks: they are refused by name, or dropped from what is passed on.
    """

    name: Literal["multistage"] = "multistage"
    proximity: Proximity
    damping: Annotated[float, BeforeValidator(_damping)] = 0.0
    inverse: Literal["ekfac", "kfac", "cg", "astra"] = "ekfac"
    fisher: Fisher = "sampled"
    curvature: Curvature | None = None
    tolerance: float | None = Field(default=None, gt=0, lt=1)
    max_steps: int | None = Field(default=None, ge=1)
    unmatched: Unmatched = "refuse"
    pretraining: Pretraining
    #: What is passed on is multiplied on: its directions are not rounded.
    exact: ClassVar[bool] = True

    @model_validator(mode="after")
    def _options_suit_the_inverse(self) -> Self:
        given = {name: getattr(self, name) for name in ("curvature", "tolerance", "max_steps")}
        for name, value in given.items():
            if value is not None and self.inverse not in _SOLVERS:
                raise ValueError(f'{name} = {value} is for inverse = "cg" or "astra", and it is "{self.inverse}"; leave this out')
        return self

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Every earlier stage, the latest first."""
        found, name, proximity, table = [], "pretraining", self.proximity, self.pretraining
        while True:
            damping = table.damping if table.damping is not None else "heuristic" if table.pretraining is None else 0.0
            pulled = table.proximity or 0.0
            total = damping if isinstance(damping, str) else pulled + damping
            found.append(Stage(name, table, proximity, self.taking(total)))
            if table.pretraining is None:
                return tuple(found)
            name, proximity, table = f"{name}.pretraining", pulled, table.pretraining

    def taking(self, damping: float | Literal["heuristic"]) -> Method:
        """The method that takes the inverse of a stage's curvature with a damping, under this one's label."""
        options: dict[str, Any] = {"damping": damping, "fisher": self.fisher, "label": self.title}
        options |= {name: value for name in ("curvature", "tolerance", "max_steps") if (value := getattr(self, name)) is not None}
        return _KINDS[self.inverse](**options)

    @property
    def own_stage(self) -> Method:
        """The method that takes the inverse of the fine-tuned stage: H_ft + (a + damping) I."""
        return self.taking(self.proximity + self.damping)

    @property
    def fits(self) -> tuple[Fit, ...]:
        """Those of the fine-tuned stage."""
        return self.own_stage.fits

    @property
    def stochastic(self) -> bool:
        """As its inverse is."""
        return self.own_stage.stochastic

    @property
    def vectors(self) -> int:
        """As its inverse holds, and what is carried."""
        return self.own_stage.vectors + 1

    @property
    def shares_passes(self) -> bool:
        """As its inverse does."""
        return self.own_stage.shares_passes

    @property
    def gives_own(self) -> bool:
        """As its inverse does."""
        return self.own_stage.gives_own

    def determining(self) -> dict[str, Any]:
        """Of the fine-tuned stage: nothing of the earlier ones."""
        return {name: value for name, value in super().determining().items() if name not in ("pretraining", "unmatched")}

    def check(self, attributed: Attributed) -> None:
        """As its inverse does, for the fine-tuned model; the earlier ones are asked each by its own."""
        self.own_stage.check(attributed)

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_q = -(H_ft + (a + damping) I)^-1 g_q, in full products."""
        return self.own_stage.directions(replace(work, products="full"), gradients)

    def damping_of(self, curvature: Sequence[Any]) -> list[float] | float | None:
        """Proximity + damping."""
        return self.own_stage.damping_of(curvature)

    def own(self, curvature: Sequence[Any]) -> Own | None:
        """Of the fine-tuning examples, as its inverse gives it."""
        return self.own_stage.own(curvature)
