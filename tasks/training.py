"""Training the checkpoint of a run that gives none, and what the training passed through.

weights.safetensors          what it ended with
steps/<step>.safetensors     checkpoints on the way, where `fit` reports any: at most trajectory.KEPT, evenly spaced
trajectory.json              their steps, learning rates summed up, and weight decay; the digest of the weights that the training ended with
complete.json                last
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import torch
from torch import nn

from infra import storage
from tasks import checksums, layout
from tasks.subject import DTYPES, Subject, open_subject, read_checkpoint
from tda import checkpoint, location
from tda.carried import begin
from tda.checksums import of
from tda.device import device_here, ready
from tda.errors import InputError
from tda.methods import Method
from tda.problem import Problem, load_problem, training_device
from tda.trajectory import Recorder, Segment, Trajectory, cut

#: The option by which a method says how many stretches it cuts a training into, where it is not `segments`.
_OPTIONS = {"tracin": "checkpoints", "trak": "models"}


def train(job: tuple[Subject, int, str] | tuple[Subject, int, str, Subject | None]) -> dict[str, Any]:
    """Train the subject's model with a seed and write artifacts/checkpoint/<fingerprint>: weights, then the marker.

    job: (subject, seed, artifact URL), and the subject from whose weights training starts where that is not from fresh ones. Does nothing
    where the artifact is complete.
    """
    subject, seed, url, start = job if len(job) == 4 else (*job, None)
    started = time.perf_counter()
    if not layout.is_complete(url):
        problem = load_problem(subject.problem, json.loads(subject.options))
        torch.manual_seed(seed)
        model = problem.model()
        model = model if subject.dtype == "auto" else model.to(DTYPES[subject.dtype])
        model = model.to(training_device(problem, ready(device_here(subject.device))))
        if start is not None:
            begin(model, open_subject(start).attributed.model.state_dict(), start.checkpoint)
        recorder = Recorder(
            model,
            lambda name, data: storage.write_bytes(location.join(url, name), data),
            lambda name: storage.delete(location.join(url, name)),
        )
        problem.fit(model, problem.train_data(), seed=seed, on_checkpoint=recorder)
        data = checkpoint.dump(model)
        digest = checkpoint.digest(checkpoint.parse(data, "of the training just done"))
        trajectory = recorder.finish(model)
        if trajectory is not None:
            storage.write_json(location.join(url, "trajectory.json"), trajectory.to_json() | {"digest": digest})
        storage.write_bytes(location.join(url, "weights.safetensors"), data)
        checksums.complete(url, {"seed": seed, "digest": digest}, {"weights.safetensors": of(data)})
    return {"seconds": time.perf_counter() - started}


def read_trajectory(weights: str, method: str = "source") -> Trajectory:
    """The trajectory of the training that ended with `weights`, the URL of a weights.safetensors. method: which needs it, for the message.

    Raises InputError where it is not known: the checkpoint was not trained by a run, its `fit` reported nothing, or the trajectory is of
    other weights than these (or does not say of which).
    """
    url = location.join(weights.rpartition("/")[0], "trajectory.json")
    try:
        found = location.read_json(url)
    except FileNotFoundError as error:
        raise InputError(_unknown(weights, method)) from error
    digest = checkpoint.digest(read_checkpoint(weights))
    if found.get("digest") != digest:
        raise InputError(
            f"{url} is not of the training that ended with {weights}; put back the two that were written together, "
            "or train anew: without `checkpoint`, and where that folder is a store's own, after deleting it"
        )
    return Trajectory.from_json(found)


def _unknown(weights: str, method: str) -> str:
    needed = f"{method} needs the training's checkpoints"
    call = "call on_checkpoint(model=..., learning_rate=..., step=...) after each epoch"
    if layout.is_complete(weights.rpartition("/")[0]):
        return f"{needed}, and the fit that ended with {weights} reported none; let it {call}, and a run without `checkpoint` trains anew"
    return f"{needed}, and there are none beside {weights}; leave `checkpoint` out, so that the run trains with a fit; let that {call}"


def segments_of(method: Method, weights: str) -> tuple[Segment, ...]:
    """The training that ended with `weights`, cut as a method asks.

    Raises InputError where the training's checkpoints are not known, or too few.
    """
    return _cut(method, read_trajectory(weights, method.name))


def check_recipe(method: Method, problem: Problem, examples: int) -> None:
    """InputError where a training by the problem's recipe reports too few checkpoints for a method; nothing is known of other fits."""
    recipe = problem.recipe()
    if recipe is None or type(problem).fit is not Problem.fit:
        return
    model, steps = nn.Linear(1, 1), -(-examples // recipe.batch_size)
    recorder = Recorder(model, lambda _name, _data: None, lambda _name: None)
    for epoch in range(1, recipe.epochs + 1):
        recorder(model=model, learning_rate=recipe.learning_rate, step=epoch * steps, momentum=recipe.momentum)
    trajectory = recorder.finish(model)
    assert trajectory is not None
    _cut(method, trajectory, f"; the recipe reports one after each of its {recipe.epochs} epochs")


def _cut(method: Method, trajectory: Trajectory, told: str = "") -> tuple[Segment, ...]:
    """The same; an error names the option that the method itself has for it."""
    option = _OPTIONS.get(method.name, "segments")
    try:
        return cut(trajectory, method.segments, per_segment=method.per_segment)  # type: ignore[attr-defined]
    except InputError as error:
        said = re.sub(r"\bsegment(s?)\b", option.removesuffix("s") + r"\1", str(error))
        raise InputError(f"{method.title}: {said}{told}") from error
