"""Chains around a checkpoint: their state, and their steps.

Shape suffixes: C chains, D numbers of a model that move, S steps.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tda.attributed import Attributed
from tda.problem import Batch
from tda.recipe import load_all
from tda.sampling.batches import Batches, Noise
from tda.sampling.ensembles import Ensemble, ensemble
from tda.sampling.options import Sampling
from tda.sampling.refusals import check_model
from tda.sampling.sampler import noise_scale, rmsprop, sgld

#: (draw, weights (C, D)) at every kept draw; the tensor moves on afterwards.
Keep = Callable[[int, Tensor], None]


@dataclass
class ChainState:
    """Where some chains stand after `step` steps: all that their further path depends on, beside the options.

    chains: their numbers (C,). weights: (C, D), the parameters that move; `Ensemble.named` names them. square: (C, D), V of
    RMSprop-SGLD. lost: chain -> why it was stopped, in one sentence; its rows are NaN.
    """

    chains: tuple[int, ...]
    step: int
    weights: Tensor
    square: Tensor | None = None
    lost: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Landscape:
    """What all chains of a run share: options, how copies of the model are computed, the checkpoint w* (D,), the training examples."""

    sampling: Sampling
    ensemble: Ensemble
    center: Tensor
    data: Batch

    @property
    def how(self) -> str:
        """How chains advance: "products", "vmap", "compiled" or "one by one: <why>"."""
        return self.ensemble.how


def landscape(attributed: Attributed, sampling: Sampling, dataset: Any) -> Landscape:
    """Prepare chains of a problem's model at its checkpoint, in eval mode. The blocks' parameters move; others stay where they are.

    The dataset is held in memory, in the model's dtype and on its device, as one batch.

    Raises:
        InputError: the batch is larger than the data, the model has no loss per example in eval mode, or cannot be compiled as asked.
    """
    data = load_all(attributed.problem, dataset, next(attributed.model.parameters()))
    size = sampling.batch(len(data.targets))
    check_model(attributed, data, size)
    made = ensemble(attributed, data, sampling)
    return Landscape(sampling, made, made.center(), made.prepare(data))


def start(landscape: Landscape, chains: Sequence[int]) -> ChainState:
    """Chains at step 0: all of them at the checkpoint, V at 0."""
    weights = landscape.center.repeat(len(chains), 1)
    square = torch.zeros_like(weights) if landscape.sampling.sampler == "rmsprop" else None
    return ChainState(tuple(chains), 0, weights, square)


def advance(landscape: Landscape, state: ChainState, until: int, keep: Keep | None = None) -> tuple[ChainState, Tensor]:
    """Make the steps state.step..until. Returns the new state and the mean loss of each step's batch before the step, (C, S).

    `keep` is called after the step at which a draw is taken. The state that is given is left as it is. Nothing waits for the device
    until the end: there, a chain of which a batch's loss or a weight is not finite is stopped (`lost`), and its losses are NaN from that
    step on. The others have the numbers that they have without it.
    """
    sampling = landscape.sampling
    center_D = landscape.center
    assert state.weights.shape[1:] == center_D.shape, "a state of another model"
    weights_CD = state.weights.to(center_D, copy=True)
    square_CD = None if state.square is None else state.square.to(center_D, copy=True)
    losses_SC = weights_CD.new_full((until - state.step, len(weights_CD)), torch.nan)
    if set(state.lost) >= set(state.chains):
        return ChainState(state.chains, until, weights_CD, square_CD, dict(state.lost)), losses_SC.T
    gradient_CD = torch.empty_like(weights_CD)
    gradient = landscape.ensemble.gradient(weights_CD, gradient_CD)
    noise = Noise(sampling.seed, state.chains, weights_CD, noise_scale(sampling))
    if square_CD is None:
        update = sgld(sampling, center_D, weights_CD, gradient_CD)
    else:
        update = rmsprop(sampling, center_D, weights_CD, gradient_CD, square_CD)
    batches = Batches(sampling, state.chains, landscape.data).steps(state.step, until)
    for step, (batch, losses_C) in enumerate(zip(batches, losses_SC.unbind(0), strict=True), state.step + 1):
        gradient(batch, losses_C)
        with torch.no_grad():
            update(noise.at(step - 1))
        draw, between = divmod(step - sampling.burn_in, sampling.thinning)
        if keep is not None and draw >= 1 and not between:
            keep(draw - 1, weights_CD)
    return _stopped(sampling, ChainState(state.chains, until, weights_CD, square_CD, dict(state.lost)), losses_SC.T)


def _stopped(sampling: Sampling, state: ChainState, losses_CS: Tensor) -> tuple[ChainState, Tensor]:
    """The same with the chains that went out of bounds marked as lost."""
    finite_CS, whole_C = losses_CS.isfinite().cpu(), state.weights.isfinite().all(1).cpu()
    first = state.step - losses_CS.shape[1]
    for c, chain in enumerate(state.chains):
        if chain in state.lost or bool(whole_C[c] and finite_CS[c].all()):
            continue
        bad = (~finite_CS[c]).nonzero()
        place = int(bad[0]) if len(bad) else losses_CS.shape[1]
        what = f"the batch's loss is {float(losses_CS[c, place])}" if len(bad) else "a weight is not finite"
        lose(sampling, state, chain, first + place, what)
        losses_CS[c, place:] = torch.nan
    return state, losses_CS


def lose(sampling: Sampling, state: ChainState, chain: int, step: int, what: str) -> None:
    """Stop a chain at a step, and say why."""
    state.lost[chain] = f"chain {chain} was stopped at step {step}: {what}; lower step_size (now {sampling.step_size:g})"
    for tensor in (state.weights, state.square):
        if tensor is not None:
            tensor[state.chains.index(chain)] = torch.nan


def state_tensors(state: ChainState) -> dict[str, Tensor]:
    """The state as named tensors on the CPU, as safetensors stores them; sentences are bytes."""
    sentences = json.dumps({str(chain): why for chain, why in state.lost.items()}).encode()
    found = {
        "chains": torch.tensor(state.chains),
        "step": torch.tensor(state.step),
        "weights": state.weights.cpu(),
        "lost": torch.frombuffer(bytearray(sentences), dtype=torch.uint8),
    }
    return found if state.square is None else found | {"square": state.square.cpu()}


def state_from(tensors: Mapping[str, Tensor]) -> ChainState:
    """The inverse of `state_tensors`; `advance` takes it to its device."""
    lost = {int(chain): why for chain, why in json.loads(bytes(tensors["lost"].tolist())).items()}
    return ChainState(tuple(tensors["chains"].tolist()), int(tensors["step"]), tensors["weights"], tensors.get("square"), lost)
