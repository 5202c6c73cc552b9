"""What a training passed through: its checkpoints, its learning rates, and how it is cut into segments (Bae et al. 2024).

A trainer reports with on_checkpoint(model=..., learning_rate=..., step=..., momentum=..., weight_decay=...), at any cadence and after
its last step. learning_rate, momentum and weight_decay are those of the steps since the last report, step counts the optimizer's steps
so far. The `time` that steps take is the sum of eta / (1 - beta) over all of them: gradient flow for so long is what they amount to.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tda import checkpoint
from tda.errors import InputError

#: Checkpoints that are kept of a training, evenly spaced over its reports, the first and the last among them.
KEPT = 24
#: Reports of which none is dropped: room is left for the initial weights and for the last report.
WHOLE = KEPT - 2


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was kept.

    name: where it lies, from the folder of the training's last weights. step: the optimizer's steps before it. time: of these steps.
    weight_decay: its mean over the time since the checkpoint before.
    """

    name: str
    step: int
    time: float
    weight_decay: float


@dataclass(frozen=True)
class Trajectory:
    """The checkpoints of a training in order, the initial weights first.

    whole: whether the last one is what the training ended with. reported: how many it reported, of which some were not kept.
    """

    saved: tuple[Saved, ...]
    whole: bool = True
    reported: int = 0

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @staticmethod
    def from_json(found: dict[str, Any]) -> Trajectory:
        """The inverse of `to_json`."""
        return Trajectory(tuple(Saved(**one) for one in found["saved"]), found["whole"], found["reported"])


@dataclass(frozen=True)
class Segment:
    """Steps start_step..stop_step of a training.

    checkpoints: names of those that stand for it. horizon: its time, eta K with momentum counted as eta / (1 - beta). weight_decay: its
    mean over that time.
    """

    checkpoints: tuple[str, ...]
    start_step: int
    stop_step: int
    horizon: float
    weight_decay: float


@dataclass(frozen=True)
class _Report:
    """One report: what was done until then. decay: the integral of the weight decay over time."""

    step: int
    time: float
    decay: float


class Recorder:
    """The on_checkpoint of one training: adds up its time over every step, and keeps at most KEPT of its checkpoints.

    save(name, bytes) and drop(name) store a checkpoint and let it go; which are kept depends on the reports alone. Reports are kept
    evenly: when there are too many, every second one is dropped, and from then on half as many are taken.
    """

    def __init__(self, model: nn.Module, save: Callable[[str, bytes], None], drop: Callable[[str], None], *, kept: int = KEPT) -> None:
        """model: as it is before its first step."""
        self._save, self._drop, self._most = save, drop, kept
        self._stride, self._count = 1, 0
        self._kept: list[tuple[int, _Report]] = []
        self._last, self._bytes = _Report(0, 0.0, 0.0), checkpoint.dump(model)

    def __call__(
        self,
        *,
        model: nn.Module,
        learning_rate: float,
        step: int | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        **unknown: Any,
    ) -> None:
        """Report a checkpoint. Without `step`, each call counts as one step. Numbers may be tensors or arrays of one element.

        Raises InputError where a number is none or out of its range, where `step` falls, or where the weights moved in no step.
        """
        if unknown:
            known = "model, learning_rate, step, momentum, weight_decay"
            raise InputError(f"on_checkpoint got {', '.join(unknown)}; it takes {known}")
        if not isinstance(model, nn.Module):
            raise InputError(f"on_checkpoint(model={_shown(model)}): it must be the torch.nn.Module that is trained")
        learning_rate = _number("learning_rate", learning_rate, math.inf)
        momentum = _number("momentum", momentum, 1.0)
        weight_decay = _number("weight_decay", weight_decay, math.inf)
        before = self._last
        step = before.step + 1 if step is None else _whole(step)
        data = checkpoint.dump(model)
        if step < before.step or (step == before.step > 0 and data != self._bytes):
            raise InputError(f"on_checkpoint(step={step}) after step {before.step}; report the number of optimizer steps taken so far")
        if step > before.step:
            if self._count == 0:
                self._take(0, before)  # the initial weights, now that there is a trajectory
            self._count += 1
            time = (step - before.step) * learning_rate / (1 - momentum)
            self._last = _Report(step, before.time + time, before.decay + time * weight_decay)
        self._bytes = data
        if step > before.step and self._count % self._stride == 0:
            self._take(self._count, self._last)

    def finish(self, model: nn.Module) -> Trajectory | None:
        """The trajectory of a training that ended with `model`; None where it never reported a step."""
        if self._count == 0:
            return None
        if self._kept[-1][1] != self._last:
            self._take(self._count, self._last, room=0)
        reports = [report for _, report in self._kept]
        saved = [Saved(_name(0), 0, 0.0, 0.0)]
        for a, b in pairwise(reports):
            time = b.time - a.time
            saved.append(Saved(_name(b.step), b.step, b.time, (b.decay - a.decay) / time if time else 0.0))
        return Trajectory(tuple(saved), checkpoint.dump(model) == self._bytes, self._count)

    def _take(self, index: int, report: _Report, room: int = 1) -> None:
        self._save(_name(report.step), self._bytes)
        self._kept.append((index, report))
        if len(self._kept) + room > self._most:
            self._stride *= 2
            for gone in [kept for kept in self._kept if kept[0] % self._stride]:
                self._kept.remove(gone)
                self._drop(_name(gone[1].step))


def _name(step: int) -> str:
    return f"steps/{step:012d}.safetensors"


def _number(what: str, value: object, below: float) -> float:
    found = _scalar(value)
    if not 0 <= found < below:  # NaN neither
        must = "a number >= 0 and < 1" if below == 1 else "a finite number >= 0"
        raise InputError(f"on_checkpoint({what}={_shown(value)}): it must be {must}")
    return found


def _whole(value: object) -> int:
    found = _scalar(value)
    if not found.is_integer():
        raise InputError(f"on_checkpoint(step={_shown(value)}): it must be a whole number, of optimizer steps taken so far")
    return int(found)


def _scalar(value: object) -> float:
    """The number, also in a tensor or an array of one element; NaN for what is none."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.item() if math.prod(value.shape) == 1 else None
    try:
        return math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        return math.inf


def _shown(value: object) -> str:
    """A value in one short line."""
    return " ".join(reprlib.repr(value).split())


def cut(trajectory: Trajectory, segments: int | Sequence[int] = 3, per_segment: int = 2) -> tuple[Segment, ...]:
    """Cut a training into segments, each with `per_segment` checkpoints that stand for it.

    segments: how many, of equal numbers of steps up to the nearest checkpoints; or the step at which each stops, the last being the last
    step (between two checkpoints, time is taken to pass evenly). The checkpoints are those nearest to the middles of the segment's
    per_segment parts; one on the border of two segments may stand for both.

    Raises InputError where there are too few checkpoints, the stops are not rising steps of the training, or a segment takes no time.
    """
    saved = trajectory.saved
    last = saved[-1].step
    if not trajectory.whole:
        raise InputError(f"the training went on after step {last}, its last report: call on_checkpoint after the last step, too")
    stops = _equal(trajectory, segments) if isinstance(segments, int) else list(segments)
    for before, stop in zip([0, *stops], stops, strict=False):
        if stop <= before or stop > last:
            raise InputError(f"segments = {stops}: give the steps at which segments stop, rising, the last one {last}; {stop} is not one")
    if stops[-1] != last:
        raise InputError(f"segments = {stops}: the last segment must stop at the training's last step, {last}")
    return tuple(_segment(trajectory, start, stop, per_segment) for start, stop in zip([0, *stops], stops, strict=False))


def _equal(trajectory: Trajectory, count: int) -> list[int]:
    steps = [one.step for one in trajectory.saved[1:]]
    if len(steps) < count:
        raise InputError(f"segments = {count}: {_too_few(trajectory.reported, len(steps), count)}")
    inner = _nearest(steps[:-1], [steps[-1] * k / count for k in range(1, count)])
    return [*inner, steps[-1]]


def _too_few(reported: int, kept: int, count: int) -> str:
    """Why there are not `count` checkpoints, and the way out."""
    fewer = f"ask for at most {kept} segment{'s' * (kept != 1)}"
    if reported > kept:
        said, more = f"of the training's {reported} reports {kept} are kept, evenly spaced", f"{count} to {WHOLE} times, which are all kept"
    else:
        said, more = f"the training reported only {kept} checkpoint{'s' * (kept != 1)}", "more often (say, each epoch)"
    more = f", or call on_checkpoint {more}" if count <= WHOLE else f" (no more than {KEPT} checkpoints are kept)"
    return f"{said}; {fewer}{more}"


def _segment(trajectory: Trajectory, start: int, stop: int, count: int) -> Segment:
    saved = trajectory.saved
    near = [one for one in saved if start <= one.step <= stop]
    if len(near) < count:
        thinned = trajectory.reported >= len(saved)
        raise InputError(
            f"the segment of steps {start}..{stop} has {len(near)} checkpoint{'s' * (len(near) != 1)}, fewer than per_segment = {count}; "
            + (f"of {trajectory.reported} reports {len(saved) - 1} are kept: " if thinned else "call on_checkpoint more often, or ")
            + "choose longer segments or a smaller per_segment"
        )
    chosen = _nearest([one.step for one in near], [start + (stop - start) * (k + 0.5) / count for k in range(count)])
    steps, times = np.array([one.step for one in saved], float), np.array([one.time for one in saved])
    decays = np.cumsum(np.diff(times, prepend=0.0) * np.array([one.weight_decay for one in saved]))
    horizon, decay = (float(np.diff(np.interp([start, stop], steps, values))[0]) for values in (times, decays))
    if horizon <= 0:
        raise InputError(f"the learning rate of steps {start}..{stop} is 0: nothing is learned there; choose other segments")
    return Segment(tuple(one.name for one in near if one.step in chosen), start, stop, horizon, decay / horizon)


def _nearest(values: Sequence[int], targets: Sequence[float]) -> list[int]:
    """For each target in turn the nearest of the rising values that leaves one for each target after it; the later of two as near."""
    found, first = [], 0
    for k, target in enumerate(targets):
        free = range(first, len(values) - (len(targets) - 1 - k))
        best = min(free, key=lambda i: (abs(values[i] - target), -i))
        found.append(values[best])
        first = best + 1
    return found


def average(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean weights of checkpoints, summed in float64; what is not floating point (counters) is the last one's."""
    found = {}
    for name, last in states[-1].items():
        if last.is_floating_point():
            found[name] = torch.stack([state[name].double() for state in states]).mean(0).to(last.dtype)
        else:
            found[name] = last
    return found
