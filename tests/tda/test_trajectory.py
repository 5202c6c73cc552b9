"""What is kept of a training, and how it is cut: time is that of every step, whatever is kept."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tda import checkpoint
from tda.errors import InputError
from tda.trajectory import KEPT, WHOLE, Recorder, Saved, Trajectory, average, cut


class Training:
    """A model of one weight, which is the number of the step, and what its recorder has stored."""

    def __init__(self, kept=KEPT):
        self.model, self.stored = nn.Linear(1, 1, bias=False), {}
        self.at(0)
        self.recorder = Recorder(self.model, self.stored.__setitem__, self.stored.__delitem__, kept=kept)

    def at(self, weight):
        nn.init.constant_(self.model.weight, weight)

    def report(self, step, weight=None, **more):
        self.at(step if weight is None else weight)
        self.recorder(**{"model": self.model, "learning_rate": 0.1, "step": step} | more)

    def weight(self, saved):
        return float(checkpoint.parse(self.stored[saved.name], saved.name)["weight"])


def trained(*steps, **more) -> Trajectory:
    training = Training()
    for step in steps:
        training.report(step, **more)
    return training.recorder.finish(training.model)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1), st.floats(0, 0.99), st.floats(0, 1)), min_size=1, max_size=120))
def test_what_is_kept_is_even_and_time_is_of_every_step(reports):
    training, time, decay, step = Training(kept=6), [0.0], [0.0], 0
    for steps, rate, momentum, weight_decay in reports:
        step += steps
        training.report(step, learning_rate=rate, momentum=momentum, weight_decay=weight_decay)
        time += [time[-1] + k * rate / (1 - momentum) for k in range(1, steps + 1)]
        decay += [decay[-1] + k * rate / (1 - momentum) * weight_decay for k in range(1, steps + 1)]
        assert len(training.stored) <= 6
    found = training.recorder.finish(training.model)
    assert found.whole
    assert found.reported == len(reports)
    assert set(training.stored) == {saved.name for saved in found.saved}
    assert len(found.saved) <= 6
    assert found.saved[0].step == 0
    assert found.saved[-1].step == step
    assert [training.weight(saved) for saved in found.saved] == [saved.step for saved in found.saved]
    assert [saved.time for saved in found.saved] == pytest.approx([time[saved.step] for saved in found.saved])
    for a, b in pairwise(found.saved):
        assert b.weight_decay * (b.time - a.time) == pytest.approx(decay[b.step] - decay[a.step], abs=1e-9)
    # Every 2^k-th report is kept, and the last.
    ends = [0]
    for steps, *_ in reports:
        ends.append(ends[-1] + steps)
    places = [ends.index(saved.step) for saved in found.saved][:-1]
    gaps = {b - a for a, b in pairwise(places)}
    assert len(gaps) <= 1
    assert len(places) >= min(3, len(reports))


def test_without_step_each_call_counts_as_one():
    training = Training()
    for weight in (1, 2, 3):
        training.report(None, weight)
    assert [saved.step for saved in training.recorder.finish(training.model).saved] == [0, 1, 2, 3]


def test_momentum_counts_as_a_longer_step():
    found = trained(10, 20, momentum=0.9, weight_decay=0.5)
    assert [(saved.step, saved.time, saved.weight_decay) for saved in found.saved] == [
        (0, 0.0, 0.0),
        (10, pytest.approx(10.0), pytest.approx(0.5)),
        (20, pytest.approx(20.0), pytest.approx(0.5)),
    ]


def test_a_training_that_reports_nothing_has_no_trajectory():
    training = Training()
    assert training.recorder.finish(training.model) is None
    training.report(0)
    assert training.recorder.finish(training.model) is None
    assert not training.stored


def test_weights_that_fit_sets_before_its_first_step_are_the_first():
    training = Training()
    training.report(0, 7.0)
    training.report(5)
    found = training.recorder.finish(training.model)
    assert training.weight(found.saved[0]) == 7.0


def test_a_report_twice_of_the_same_step_counts_once():
    assert trained(10, 20, 20) == trained(10, 20)


def test_a_trajectory_survives_json():
    found = trained(10, 20, weight_decay=0.1)
    assert Trajectory.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"step": 9}, r"on_checkpoint\(step=9\) after step 10; report the number of optimizer steps taken so far"),
        ({"step": 10, "weight": 3}, r"on_checkpoint\(step=10\) after step 10"),
        ({"step": 11, "learning_rate": -0.1}, r"on_checkpoint\(learning_rate=-0.1\): it must be a finite number >= 0$"),
        ({"step": 11, "learning_rate": float("nan")}, "learning_rate=nan"),
        ({"step": 11, "learning_rate": float("inf")}, "learning_rate=inf"),
        ({"step": 11, "learning_rate": 10**400}, "learning_rate=1000"),
        ({"step": 11, "learning_rate": "0.1"}, r"on_checkpoint\(learning_rate='0.1'\): it must be a finite number"),
        ({"step": 11, "learning_rate": None}, "learning_rate=None"),
        ({"step": 11, "learning_rate": True}, "learning_rate=True"),
        ({"step": 11, "learning_rate": torch.ones(2, 2)}, r"learning_rate=tensor\(\[\[1.* \[1.*it must be a finite number"),
        ({"step": 11, "momentum": (0.9, 0.999)}, r"momentum=\(0.9, 0.999\)\): it must be a number >= 0 and < 1"),
        ({"step": "x"}, r"on_checkpoint\(step='x'\): it must be a whole number, of optimizer steps taken so far"),
        ({"step": 12.9}, r"step=12.9\): it must be a whole number"),
        ({"step": float("inf")}, r"step=inf\): it must be a whole number"),
        ({"step": 11, "model": {}}, r"on_checkpoint\(model={}\): it must be the torch.nn.Module"),
        ({"step": 11, "momentum": 1.0}, r"momentum=1.0\): it must be a number >= 0 and < 1"),
        ({"step": 11, "weight_decay": -1}, "weight_decay=-1"),
        ({"step": 11, "epoch": 3}, "on_checkpoint got epoch; it takes model, learning_rate, step, momentum, weight_decay"),
    ],
)
def test_reports_that_make_no_sense_are_refused(more, message):
    training = Training()
    training.report(10)
    with pytest.raises(InputError, match=message) as refused:
        training.report(**{"weight": 11} | more)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "number",
    [torch.tensor, np.float32, np.array, lambda x: np.array([x]), lambda x: torch.tensor([float(x)], requires_grad=True)],
    ids=["tensor", "float32", "array", "array of one", "parameter"],
)
def test_numbers_may_come_as_tensors_and_are_stored_as_numbers(number):
    more = {"learning_rate": number(0.5), "momentum": number(0.75), "weight_decay": number(0.125)}
    training = Training()
    training.report(number(10), 10, **more)
    found = training.recorder.finish(training.model)
    assert json.loads(json.dumps(found.to_json()))["saved"][1]["time"] == 20.0
    assert found == trained(10, learning_rate=0.5, momentum=0.75, weight_decay=0.125)


def test_of_many_reports_what_is_kept_is_the_limit_and_what_is_told():
    found = trained(*range(1, 1001))
    kept = len(found.saved) - 1
    message = f"segments = {kept + 1}: of the training's 1000 reports {kept} are kept, evenly spaced; ask for at most {kept} segments"
    with pytest.raises(InputError, match=message):
        cut(found, kept + 1)
    with pytest.raises(InputError, match=f"fewer than per_segment = 2; of 1000 reports {kept} are kept: choose longer segments"):
        cut(found, [1, 1000])
    assert len(cut(found, kept, 1)) == kept
    # The other way out: so few reports are all kept.
    assert f"or call on_checkpoint {kept + 1} to {WHOLE} times" in refusal(found, kept + 1)
    assert len(trained(*range(1, WHOLE + 1)).saved) == WHOLE + 1
    assert "or call on_checkpoint more often" in refusal(trained(*range(1, WHOLE)), WHOLE)
    # Past the limit, more reports are no way out.
    for few in (found, trained(*range(1, WHOLE + 1))):
        most = f"ask for at most {len(few.saved) - 1} segments (no more than {KEPT} checkpoints are kept)"
        assert refusal(few, WHOLE + 1).endswith(most)


def refusal(found, segments):
    with pytest.raises(InputError) as refused:
        cut(found, segments)
    return str(refused.value)


def trajectory(*steps, rate=0.1, whole=True) -> Trajectory:
    return Trajectory(tuple(Saved(f"{step}", step, step * rate, 0.2 if step else 0.0) for step in (0, *steps)), whole)


def test_equal_segments_are_cut_at_the_nearest_checkpoints():
    segments = cut(trajectory(*range(10, 101, 10)), 3)
    assert [(s.start_step, s.stop_step) for s in segments] == [(0, 30), (30, 70), (70, 100)]
    assert [s.horizon for s in segments] == pytest.approx([3.0, 4.0, 3.0])
    assert [s.weight_decay for s in segments] == pytest.approx([0.2] * 3)
    # Checkpoints stand at about a quarter and three quarters of a segment.
    assert [s.checkpoints for s in segments] == [("10", "20"), ("40", "60"), ("80", "90")]


def test_three_epochs_make_three_segments_between_their_ends():
    assert [s.checkpoints for s in cut(trajectory(1, 2, 3), 3)] == [("0", "1"), ("1", "2"), ("2", "3")]


@given(st.lists(st.integers(1, 20), min_size=4, max_size=30), st.integers(1, 4), st.integers(1, 2))
def test_segments_cover_the_training_without_a_gap(gaps, count, per_segment):
    steps = [sum(gaps[: k + 1]) for k in range(len(gaps))]
    found = trajectory(*steps)
    segments = cut(found, count, per_segment)
    assert len(segments) == count
    assert [s.start_step for s in segments] == [0, *(s.stop_step for s in segments[:-1])]
    assert segments[-1].stop_step == steps[-1]
    assert sum(s.horizon for s in segments) == pytest.approx(found.saved[-1].time)
    for s in segments:
        assert len(set(s.checkpoints)) == per_segment
        assert all(s.start_step <= int(name) <= s.stop_step for name in s.checkpoints)


def test_stops_may_lie_between_checkpoints_and_time_passes_evenly_there():
    found = Trajectory((Saved("0", 0, 0.0, 0.0), Saved("10", 10, 1.0, 0.1), Saved("20", 20, 5.0, 0.3)))
    segments = cut(found, [15, 20], per_segment=1)
    assert [s.horizon for s in segments] == pytest.approx([3.0, 2.0])
    assert [s.weight_decay for s in segments] == pytest.approx([(0.1 + 2 * 0.3) / 3, 0.3])
    assert [s.checkpoints for s in segments] == [("10",), ("20",)]


@pytest.mark.parametrize(
    ("found", "options", "message"),
    [
        (trajectory(10), {"segments": 3}, "segments = 3: the training reported only 1 checkpoint; ask for at most 1 segment, or call"),
        (trajectory(10, 20), {"segments": [12, 20]}, r"steps 12..20 has 1 checkpoint, fewer than per_segment = 2"),
        (trajectory(10, 20), {"segments": [20, 10]}, r"segments = \[20, 10\]: give the steps at which .* rising, the last one 20; 10 is"),
        (trajectory(10, 20), {"segments": [10, 30]}, "the last one 20; 30 is not one"),
        (trajectory(10, 20), {"segments": [0, 20]}, "0 is not one"),
        (trajectory(10, 20), {"segments": [10]}, r"segments = \[10\]: the last segment must stop at the training's last step, 20"),
        (trajectory(10, 20), {"segments": 1, "per_segment": 5}, "has 3 checkpoints, fewer than per_segment = 5"),
        (trajectory(10, 20, rate=0.0), {"segments": 1}, "the learning rate of steps 0..20 is 0"),
        (trajectory(10, whole=False), {"segments": 1}, "the training went on after step 10, its last report"),
    ],
)
def test_cuts_that_make_no_sense_are_refused(found, options, message):
    with pytest.raises(InputError, match=message):
        cut(found, **options)


def test_a_training_that_goes_on_after_its_last_report_is_known():
    training = Training()
    training.report(10)
    training.at(11)
    assert not training.recorder.finish(training.model).whole


def test_the_average_is_the_mean_of_weights_and_the_last_of_counters():
    states = [{"w": torch.tensor([float(k), 2.0], dtype=torch.float32), "steps": torch.tensor(k)} for k in (1, 4)]
    found = average(states)
    assert found["w"].dtype == torch.float32
    assert found["w"].tolist() == [2.5, 2.0]
    assert int(found["steps"]) == 4
