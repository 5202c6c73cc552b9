"""GradCos: the cosine of the gradients, with the sign of an influence."""

from __future__ import annotations

from typing import ClassVar, Literal

from tda.methods.graddot import GradDot


class GradCos(GradDot):
    """score[q, i] = -cos(grad f_q, grad l_i): GradDot without the examples' gradient norms, hence without a unit."""

    name: Literal["gradcos"] = "gradcos"  # type: ignore[assignment]
    cosine: ClassVar[bool] = True
    unit: ClassVar[str] = "cosine, from -1 to 1, no unit"
