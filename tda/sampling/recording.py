"""What is kept of a piece of the chains: losses and measurements of all examples at every kept draw, as differences to those at w*.

Draws are evaluated several at a time, the weights of each as one more copy of the model, so that a single chain has the large products
of many. Shape suffixes: C chains, T draws, D numbers of a model that move, n training examples, q queries, K tokens, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tda.attributed import Attributed
from tda.errors import InputError
from tda.problem import Batch, Problem, measurement_of
from tda.recipe import load_all
from tda.sampling.chains import ChainState, Landscape, advance, lose
from tda.sampling.compiled import Compiled, Evaluation
from tda.sampling.ensembles import Ensemble, OneByOne, Stacked
from tda.sampling.losses import example_losses, measurements, token_losses
from tda.sampling.options import Piece

#: Numbers of the widest activation of all copies at once: few enough that they stay in the cache, where every pass over them is cheap ...
CACHED = 1 << 18
#: ... but so many of one copy, where copies are evaluated one after another: Python costs as much as a small product does.
ALONE = 1 << 21
#: Of a compiled evaluation: what lies between two of its products should stay in the cache.
COMPILED = 1 << 19
#: Numbers of weights that wait for their evaluation, and draws that they may be.
WAITING, DRAWS = 1 << 16, 32


@dataclass(frozen=True)
class Recorded:
    """Some draws of some chains on the CPU; float32, NaN from where a chain was lost. The differences are formed in float64.

    loss_train (C, T, n), loss_query (C, T, q): l(w) - l(w*), nats. measurement_query (C, T, q): f(w) - f(w*). token_loss_train (C, T, n, K)
    and token_loss_query (C, T, q, K): per token, where asked; they sum to the losses. distance (C, T): ||w - w*||. batch_loss (C, S): the
    mean loss of every step's batch, before the step.
    """

    loss_train: Tensor
    loss_query: Tensor
    measurement_query: Tensor
    token_loss_train: Tensor | None
    token_loss_query: Tensor | None
    distance: Tensor
    batch_loss: Tensor


class Recorder:
    """Evaluates all training examples and queries along chains; made once per process, as it holds them and their values at w*."""

    def __init__(self, attributed: Attributed, landscape: Landscape, train: Any, queries: Any, *, tokens: bool = False) -> None:
        """`train` must be what the landscape was made of. tokens: keep the losses of single tokens, too.

        Raises:
            InputError: tokens of a likelihood that has none; an evaluation cannot be compiled, and `compiled` is true.
        """
        self.landscape, self.width = landscape, _widest(attributed, train)
        # Products of several copies are worth it only while one copy's are small.
        self.ensemble = landscape.ensemble
        if isinstance(self.ensemble, Stacked) and self.width * len(landscape.data.targets) >= CACHED:
            self.ensemble = OneByOne(attributed, "evaluation")
        self.train = _Split(attributed.problem, self.ensemble, landscape.data, measured=False, tokens=tokens)
        loaded = load_all(attributed.problem, queries, next(attributed.model.parameters()))
        self.query = _Split(attributed.problem, self.ensemble, landscape.ensemble.prepare(loaded), measured=True, tokens=tokens)
        if isinstance(self.ensemble, Compiled):
            for split in (self.train, self.query):
                size = even(len(split.data.targets), max(1, COMPILED // self.width))
                split.compile(self.ensemble, size, needed=landscape.sampling.compiled is True)
        for split in (self.train, self.query):
            split.base = {name: value[0, 0] for name, value in split.values(landscape.center[None], self._examples(1)).items()}

    def _examples(self, copies: int) -> int:
        """Examples of an evaluation of so many copies."""
        return max(1, ALONE // self.width if isinstance(self.ensemble, OneByOne) else CACHED // (copies * self.width))

    def record(self, state: ChainState, piece: Piece) -> tuple[ChainState, Recorded]:
        """Advance the chains over a piece; the new state, and what was recorded on the way.

        A chain whose loss, measurement or weights are not finite at a draw is lost from that draw on.
        """
        assert state.step == piece.start
        count, draws, center = len(state.chains), len(piece.draws), self.landscape.center
        several = max(1, min(DRAWS, WAITING // (count * len(center)), draws))
        waiting_TCD = center.new_empty(several, count, len(center))
        examples = self._examples(several * count)
        distance = center.new_empty(count, draws)
        found = {name: value for split in (self.train, self.query) for name, value in split.empty(count, draws).items()}

        def evaluate(first: int, some_TCD: Tensor) -> None:
            where = slice(first, first + len(some_TCD))
            distance[:, where] = torch.linalg.vector_norm(some_TCD - center, dim=2).T
            for split in (self.train, self.query):
                split.values(some_TCD.flatten(0, 1), examples, {name: found[name][:, where] for name in split.base})

        def keep(draw: int, weights_CD: Tensor) -> None:
            place, among = divmod(draw - piece.draws.start, several)
            waiting_TCD[among].copy_(weights_CD)
            if among + 1 == several or draw + 1 == piece.draws.stop:
                evaluate(place * several, waiting_TCD[: among + 1])

        after, losses = advance(self.landscape, state, piece.stop, keep)
        on_cpu = {name: value.cpu() for name, value in found.items()}
        tokens = [on_cpu.pop(name, None) for name in ("token_loss_train", "token_loss_query")]
        recorded = Recorded(
            **on_cpu, token_loss_train=tokens[0], token_loss_query=tokens[1], distance=distance.float().cpu(), batch_loss=losses.cpu()
        )
        self._cut(after, piece, recorded)
        return after, recorded

    def _cut(self, state: ChainState, piece: Piece, recorded: Recorded) -> None:
        """Mark chains that are not finite at a draw as lost, and put NaN where chains were lost."""
        options = self.landscape.sampling
        kept = {f.name: value for f in fields(recorded) if f.name != "batch_loss" and (value := getattr(recorded, f.name)) is not None}
        steps = [options.burn_in + (draw + 1) * options.thinning - piece.start for draw in piece.draws]
        # A sum is finite only where all its terms are.
        good_CT = torch.stack([value.flatten(2).sum(2) if value.ndim > 2 else value for value in kept.values()]).isfinite().all(0).tolist()
        for c, chain in enumerate(state.chains):
            until = int(recorded.batch_loss[c].isfinite().sum())  # steps until the batch's loss was no number
            bad = [t for t, step in enumerate(steps) if step >= until + (until == piece.stop - piece.start) or not good_CT[c][t]]
            if not bad:
                continue
            if chain not in state.lost:
                lose(options, state, chain, piece.start + steps[bad[0]], _culprit(kept, c, bad[0]))
                recorded.batch_loss[c, steps[bad[0]] :] = torch.nan
            for value in kept.values():
                value[c, bad[0] :] = torch.nan


def _culprit(kept: dict[str, Tensor], c: int, t: int) -> str:
    """What is not finite at a draw."""
    if not bool(kept["distance"][c, t].isfinite()):
        return "a weight is not finite"
    for name, value in kept.items():
        if name != "distance" and len(bad := (~value[c, t].isfinite()).nonzero()):
            what, split = ("measurement" if "measurement" in name else "loss"), name.rsplit("_", 1)[1]
            place = tuple(bad[0].tolist())
            return f"the {what} of {split} example {place[0]} is {float(value[c, t][place])}"
    return "the sum of the losses is not finite"


class _Split:
    """Examples and what they are at w*: `base` by the names of `Recorded`."""

    def __init__(self, problem: Problem, ensemble: Ensemble, data: Batch, *, measured: bool, tokens: bool) -> None:
        self.problem, self.ensemble, self.data, self.tokens = problem, ensemble, data, tokens
        self.name, self.measured = ("query" if measured else "train"), measured
        self.own = measured and measurement_of(problem)["name"] != "loss"
        self.base: dict[str, Tensor] = {}
        self.program: Evaluation | None = None
        self.size = 0

    def compile(self, ensemble: Compiled, size: int, *, needed: bool) -> None:
        """Evaluate by a compiled program, `size` examples at a time; unless that is `needed`, what cannot be compiled stays as it is."""
        try:
            self.program, self.size = ensemble.evaluation(self._of, self._part(0, size, size)), size
        except InputError as error:
            if needed:
                raise InputError(f'compiled is true, but of an evaluation {error}; set it to false or "auto"') from error

    def empty(self, chains: int, draws: int) -> dict[str, Tensor]:
        """Where the values of so many draws go."""
        return {name: base.new_empty(chains, draws, *base.shape, dtype=torch.float32) for name, base in self.base.items()}

    def values(self, weights_MD: Tensor, examples: int, into: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The values of copies, so many examples at a time, as differences to `base`, put into (C, T, n, ...), M = T C.

        Without `into`: the values themselves, in float64.
        """
        if isinstance(self.ensemble, OneByOne) and into is not None and len(weights_MD) > 1:
            chains = len(next(iter(into.values())))
            for m, weights_D in enumerate(weights_MD):
                t, c = divmod(m, chains)
                self.values(weights_D[None], examples, {name: place[c : c + 1, t : t + 1] for name, place in into.items()})
            return {}
        parts: dict[str, list[Tensor]] = {}
        examples = self.size or examples
        for first in range(0, len(self.data.targets), examples):
            where = slice(first, min(first + examples, len(self.data.targets)))
            for name, value in self._some(weights_MD, self._part(first, examples, self.size)).items():
                if into is None:
                    parts.setdefault(name, []).append(value[:, None, : where.stop - first])
                    continue
                place = into[name]
                # Not in place: two values of a program may be one tensor.
                apart = (value[:, : where.stop - first] - self.base[name][where]).unflatten(0, (place.shape[1], place.shape[0]))
                place[:, :, where].copy_(apart.transpose(0, 1))
        return {name: torch.cat(values, 2) for name, values in parts.items()}

    def _part(self, first: int, examples: int, least: int) -> Batch:
        """So many examples from `first` on, or those that are left; the last of them again and again, up to the `least` of a program."""
        ids: Any = slice(first, first + examples)
        if len(self.data.targets) - first < least:
            ids = torch.arange(first, first + least, device=self.data.targets.device).clamp_(max=len(self.data.targets) - 1)
        return Batch(tree_map(lambda leaf: leaf[ids], self.data.inputs), self.data.targets[ids])

    def _some(self, weights_MD: Tensor, batch: Batch) -> dict[str, Tensor]:
        if self.program is not None:
            return self.program(weights_MD, batch)
        return self._of(self.ensemble.outputs(weights_MD, batch), batch.targets)

    def _of(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        found, likelihood, name = {}, self.problem.likelihood, self.name
        if self.tokens:
            found[f"token_loss_{name}"] = token_losses(likelihood, outputs, targets)
            found[f"loss_{name}"] = found[f"token_loss_{name}"].sum(2)
        else:
            found[f"loss_{name}"] = example_losses(likelihood, outputs, targets)
        if self.measured:
            found["measurement_query"] = measurements(self.problem, outputs, targets) if self.own else found[f"loss_{name}"].clone()
        return found


def even(examples: int, most: int) -> int:
    """Examples of one evaluation: `most` or somewhat fewer, so that the last is as full as the others."""
    return -(-examples // -(-examples // most))


def _widest(attributed: Attributed, dataset: Any) -> int:
    """Numbers of one example's widest activation, among the outputs of modules."""
    widest = [1]

    def look(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
        widest.extend(leaf.numel() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))

    handles = [module.register_forward_hook(look) for module in attributed.model.modules()]
    try:
        with torch.no_grad():
            attributed.problem.predict(attributed.model, attributed.load(dataset, [0]))
    finally:
        for handle in handles:
            handle.remove()
    return max(widest)
