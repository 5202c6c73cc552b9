"""What a gradient method is: its options, the fits that it needs, and the directions that it makes of query gradients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from tda.blocks import Block
from tda.directions import Direction
from tda.methods.work import Fit, Made, Work
from tda.self_products import Own

if TYPE_CHECKING:
    from tda.attributed import Attributed
    from tda.scoring import Direct
    from tda.trajectory import Segment

#: The unit of every score that is an influence.
INFLUENCE_UNIT = "units of the measurement (nats for a log-likelihood loss)"


class Method(BaseModel):
    """Options of one `[[methods]]` table; the subclass is the method."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: str
    label: str | None = Field(default=None, min_length=1, max_length=64, pattern=r"^[\w.+-]+$")

    #: Whose training gradients the directions meet: the final checkpoint's, those of each segment's checkpoints, or at its mean weights.
    meets: ClassVar[Literal["final", "checkpoints", "averages"]] = "final"
    #: Where query gradients are taken: at the final checkpoint, or also at those that stand for the segments (`Work.gradients_at`).
    asks: ClassVar[Literal["final", "checkpoints"]] = "final"
    #: What is drawn by the run's seed, where anything is.
    noise: ClassVar[str] = "mini-batches of the training examples, keyed by the run's seed; the residuals of its solve are stored"
    #: Whether its scores depend on the weights of the checkpoint.
    of_weights: ClassVar[bool] = True
    #: Whether its directions are exact to a stated residual, so that they are kept in the model's dtype whatever products are taken in.
    exact: ClassVar[bool] = False
    #: Whether scores are divided by the norms of both gradients.
    cosine: ClassVar[bool] = False
    unit: ClassVar[str] = INFLUENCE_UNIT
    #: Whether what scores directly also gives standard errors, and influences of training examples on their own losses.
    has_stderr: ClassVar[bool] = False
    has_own: ClassVar[bool] = False
    #: Whether `directions` looks at the gradients of the queries; none are computed where it does not.
    takes_gradients: ClassVar[bool] = True

    @property
    def title(self) -> str:
        """The name under which its scores are stored."""
        return self.label or self.name

    @property
    def fits(self) -> tuple[Fit, ...]:
        """The fits of curvature that it needs, in the order in which `Work.curvature` holds them."""
        return ()

    @property
    def stochastic(self) -> bool:
        """Whether its directions depend on the run's seed."""
        return False

    @property
    def gives_own(self) -> bool:
        """Whether it says what training examples' influences on their own losses are taken from."""
        return type(self).own is not Method.own or type(self).owns is not Method.owns

    @property
    def rank(self) -> int | None:
        """Terms in which each layer's directions are kept; None: in full."""
        return None

    @property
    def passes(self) -> int:
        """How many directions of each query are scored."""
        return 1

    @property
    def vectors(self) -> int:
        """How many vectors with as many entries as there are parameters are held per query while directions are made."""
        return 2

    @property
    def shares_passes(self) -> bool:
        """Whether queries whose directions are made together share passes over the training set."""
        return False

    def determining(self) -> dict[str, Any]:
        """The options that its numbers depend on, as JSON."""
        found: dict[str, Any] = json.loads(self.model_dump_json(exclude={"label"}))
        return found

    def check(self, attributed: Attributed) -> None:
        """Raise InputError, in one line, where the method cannot be used with a model. Called before anything is done."""
        self.check_size(attributed.blocks)

    def check_size(self, blocks: Sequence[Block]) -> None:
        """Raise InputError, in one line, where the method would take too much memory."""

    def directions(self, work: Work, gradients: Sequence[Direction]) -> Made:
        """V_q = -C^-1 g_q, without the factor 1/N, for a batch of query gradients given block by block; none without `takes_gradients`."""
        raise TypeError(f"{type(self).__name__} makes no directions")

    def damping_of(self, curvature: Sequence[Any]) -> list[float] | float | None:
        """The damping used, by block or one for all, in units of the eigenvalues; None where there is none. curvature: of its fits."""
        return None

    def own(self, curvature: Sequence[Any]) -> Own | None:
        """What training examples' influences on their own losses are taken from; None where that would cost a solve for each."""
        return None

    def owns(self, attributed: Attributed, curvature: Sequence[Any], segments: Sequence[Segment], seed: int) -> Sequence[Own | None]:
        """The same for each pass over training gradients: what several passes give is summed. attributed, seed: as in `Work`."""
        del attributed, seed
        return [None] * len(segments) if segments else [self.own(curvature)]

    def direct(self, kept: Mapping[str, Tensor], fits: Sequence[Any] = ()) -> Direct | None:
        """What scores training examples without directions, from what `directions` kept of the queries; None: inner products do.

        fits: the method's, as `Work.curvature` holds them.
        """
        return None
