"""Losses scaled before a backward pass in float16, whose smallest number is 6e-8 and whose largest is 65,504.

Every example's output gradient is multiplied by a power of two of its own, so that the largest of it is just below TOP times what is asked
for, and its gradients are divided by the same power in float32: neither rounds. The power depends on the example alone, and so do its
gradients, whichever examples are beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tda.blocks import Pair
from tda.errors import InputError

#: What the largest entry of an example's output gradient becomes at most, where nothing else is asked for: 2^6 are left for gradients
#: that grow on their way through the layers, and those 2^34 times smaller do not vanish.
SCALE = 1024.0


def powers(seed: Tensor, scale: float) -> Tensor:
    """For each example the power of two (batch,) that brings its largest output gradient, seed (batch, ...), to [scale / 2, scale).

    1 where all of it is 0, or where it is not finite.
    """
    largest = seed.detach().abs().reshape(len(seed), -1).amax(1) if seed.numel() else seed.new_zeros(len(seed))
    sound = (largest > 0) & largest.isfinite()
    exponents = torch.frexp(torch.where(sound, largest, 1.0)).exponent
    found = torch.ldexp(torch.full_like(largest, scale), -exponents)
    # Numbers as small as float32 holds would be multiplied by more than it holds.
    return torch.where(sound, found.clamp(max=2.0**100), 1.0)


def scaled(seed: Tensor, by: Tensor) -> Tensor:
    """Output gradients (batch, ...) times a number each, (batch,)."""
    return seed * by.view(-1, *[1] * (seed.ndim - 1))


def unscaled(pair: Pair, by: Tensor, ids: Sequence[int] | None, scale: float) -> Pair:
    """A pair made of scaled output gradients, divided by the powers again. ids: of the examples, for the message.

    Raises:
        InputError: the gradients of an example overflowed; it is named.
    """
    side = (pair.left if pair.gradient == "left" else pair.right) / by[None, :, None, None]
    refuse_overflow(side.movedim(1, 0), ids, scale)
    return replace(pair, left=side) if pair.gradient == "left" else replace(pair, right=side)


def refuse_overflow(gradients: Tensor, ids: Sequence[int] | None, scale: float) -> None:
    """InputError naming the first example of gradients (batch, ...) that are not finite."""
    good = gradients.isfinite().flatten(1).all(1)
    if not bool(good.all()):
        place = int((~good).nonzero()[0])
        which = f"example {ids[place]}" if ids is not None else f"example {place} of a batch"
        raise InputError(
            f'gradients of {which} overflow float16 (autocast = "float16", autocast_scale = {scale:g}); lower autocast_scale, '
            'or use autocast = "bfloat16", which holds numbers as large as float32 does'
        )
