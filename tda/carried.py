"""What a stage of training passes on to the one after it: parameters that both have, and query gradients carried from one to the other.

Fine-tuning that is pulled to the weights it starts from, w_ft = argmin L_ft(w) + (a/2) ||w - w_pt||^2, answers to those weights by

    d w_ft / d w_pt = a (H_ft + a I)^-1

in the parameters that both stages have, and not at all in those that one of them lacks (a new head, an old one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tda.blocks import Block, to_matrix, to_parameters
from tda.directions import Dense, Direction, dense
from tda.errors import InputError

Unmatched = Literal["refuse", "drop"]

#: Names of parameters listed in a message.
LISTED = 5


@dataclass(frozen=True)
class Matched:
    """Which attributed parameters two stages share, by name and shape.

    only_later, only_earlier: names of those that the other stage lacks, or has in another shape. later, earlier: numbers in each.
    """

    names: tuple[str, ...]
    only_later: tuple[str, ...]
    only_earlier: tuple[str, ...]
    shared: int
    later: int
    earlier: int


def match(later: Sequence[Block], earlier: Sequence[Block], stage: str, unmatched: Unmatched) -> Matched:
    """Match the attributed parameters of a stage and of the `earlier` one that it started from, which is called `stage`.

    Raises:
        InputError: they share none; or, with unmatched = "refuse", one of them has parameters that the other lacks: they are named.
    """
    here, there = shapes(later), shapes(earlier)
    names = tuple(name for name, shape in here.items() if there.get(name) == shape)
    only_later, only_earlier = (tuple(name for name in side if name not in names) for side in (here, there))
    sizes = [sum(math.prod(side[name]) for name in some) for side, some in ((here, names), (here, here), (there, there))]
    found = Matched(names, only_later, only_earlier, *sizes)
    said = "; ".join(
        f"{what}: {_listed(some)}"
        for what, some in (("only in the fine-tuned model", only_later), (f"only in {stage}", only_earlier))
        if some
    )
    if not names:
        raise InputError(f"{stage} shares no attributed parameter with the model fine-tuned from it ({said}); name the stage before it")
    if said and unmatched == "refuse":
        raise InputError(
            f'{stage} and the model fine-tuned from it differ in attributed parameters ({said}); exclude them, or set unmatched = "drop" '
            "where they are new or gone, as heads are"
        )
    return found


def shapes(blocks: Sequence[Block]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the blocks, a bias as one axis."""
    found: dict[str, tuple[int, ...]] = {}
    for block in blocks:
        empty = torch.empty(block.groups, block.out, block.in_, device="meta")
        found |= {name: tuple(tensor.shape) for name, tensor in to_parameters(block, empty).items()}
    return found


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + rest


def carry(
    later: Sequence[Block], directions: Sequence[Direction], earlier: Sequence[Block], factor: float, dtype: torch.dtype
) -> list[Direction]:
    """Directions (query, groups, out, in) of one stage's blocks times a factor, as those of an earlier stage's blocks, in its dtype.

    Parameters that the later stage lacks get 0: nothing of them is passed on. With directions V = -(H + a I)^-1 grad f and the factor
    -a these are a (H + a I)^-1 grad f, the gradients of the measurement in the weights that the later stage started from.
    """
    found: dict[str, Tensor] = {}
    for block, direction in zip(later, directions, strict=True):
        found |= to_parameters(block, dense(direction).to(dtype) * factor)
    some = next(iter(found.values()))
    carried: list[Direction] = []
    for block in earlier:
        wanted = shapes([block])
        kept = {
            name: found[name] if name in found and found[name].shape[1:] == shape else some.new_zeros(len(some), *shape)
            for name, shape in wanted.items()
        }
        carried.append(Dense(to_matrix(block, kept).contiguous()))
    return carried


def begin(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Let a model's training start from what of an earlier stage's state it has by name and shape, in place; the rest stays fresh.

    Raises:
        InputError: it has nothing of it.
    """
    own = model.state_dict()
    shared = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    if not shared:
        raise InputError(f"the model has no tensor of {where} ({_listed(list(state))}); training cannot start from it")
    model.load_state_dict(shared, strict=False)


def shift(later: Mapping[str, Tensor], earlier: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """||w_ft - w_pt|| / ||w_pt|| over the parameters `names` of two checkpoints, in float64."""
    moved = sum(float((later[name].detach().double() - earlier[name].detach().double()).square().sum()) for name in names)
    length = sum(float(earlier[name].detach().double().square().sum()) for name in names)
    return (moved / length) ** 0.5 if length else math.inf if moved else 0.0
