"""ASTRA-SOURCE against explicit Jacobians and matrix exponentials, in float64; and that an interrupted one goes on."""

import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tda import Categorical
from tda.blocks import to_matrix
from tda.curvature.fit import fit_factors
from tda.directions import dense, query_gradients
from tda.errors import InputError
from tda.flat import flatten
from tda.methods import astra_source as module
from tda.methods.astra_source import AstraSource
from tda.methods.iterative import ScheduleName
from tda.methods.source import FastSource
from tda.methods.work import Work
from tda.modules import inspect
from tda.solvers.astra import NAMED, Schedule
from tda.trajectory import Segment, cut
from tests.tda.pipeline import Given, relative
from tests.tda.test_source import source, train

SEGMENTS = (Segment((), 0, 10, 2.0, 0.05), Segment((), 10, 20, 5.0, 0.0), Segment((), 20, 30, 1.0, 0.01))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture(scope="module")
def work() -> Work:
    """Three segments of a network with two layers, at weights of their own."""
    torch.manual_seed(9)
    data = [(torch.randn(4, dtype=torch.float64), torch.randint(3, ())) for _ in range(19)]
    problem = Given(network(), Categorical(), data[:15], data[15:])
    averaged = tuple(inspect(problem, network(k), problem.train) for k in (1, 2, 3))
    factors = [tuple(fit_factors(each, problem.train, fisher="exact", batch_size=4)) for each in averaged]
    return Work(inspect(problem, network(), problem.train), problem.train, factors, 0, 4, segments=SEGMENTS, averaged=averaged)


@pytest.fixture
def found(work):
    return query_gradients(work.attributed, work.attributed.problem.queries, range(4), batch_size=3)[0]


def gauss_newton(attributed) -> torch.Tensor:
    """(1/N) sum_i J_i^T (diag p - p p^T) J_i, in flat coordinates."""
    total = 0
    for x, _ in attributed.problem.train:
        outputs = attributed.model(x[None])[0]
        rows = []
        for output in outputs:
            each = torch.autograd.grad(output, list(attributed.model.parameters()), retain_graph=True)
            named = dict(zip(dict(attributed.model.named_parameters()), each, strict=True))
            rows.append(torch.cat([to_matrix(b, {n: named[n] for n in b.parameters}).flatten() for b in attributed.blocks]))
        J, p = torch.stack(rows), outputs.detach().softmax(0)
        total = total + J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    return total / len(attributed.problem.train)


def ekfac(factors) -> torch.Tensor:
    """EK-FAC's curvature, in flat coordinates."""
    parts = []
    for factor in factors:
        U = torch.kron(factor.basis_out[0].contiguous(), factor.basis_in[0].contiguous())
        parts.append(U @ torch.diag(factor.eigenvalues[0].flatten()) @ U.T)
    return torch.block_diag(*parts)


def flat_of(work, directions):
    return flatten(work.attributed.blocks, [dense(direction) for direction in directions])


def test_directions_solve_the_damped_gauss_newton_matrix_of_each_segment(work, found, monkeypatch):
    monkeypatch.setitem(NAMED, "paper", Schedule(3000))
    made = AstraSource(schedule="paper", tolerance=1e-10, segments=3).directions(work, found)
    u = flat_of(work, found)
    unit = torch.eye(u.shape[1], dtype=torch.float64)
    for k in (2, 1, 0):
        segment = SEGMENTS[k]
        damped = gauss_newton(work.averaged[k]) + (1 / segment.horizon + segment.weight_decay) * unit
        assert relative(flat_of(work, made.passes[k]), -torch.linalg.solve(damped, u.T).T) < 1e-8
        # What is passed on is bent by EK-FAC, not by the answer.
        u = u @ torch.matrix_exp(-segment.horizon * (ekfac(work.curvature[k]) + segment.weight_decay * unit))
    assert [told["lambda"] for told in made.told["segments"]] == [pytest.approx(1 / s.horizon + s.weight_decay) for s in SEGMENTS]
    assert all(all(solve["converged"]) for solve in made.told["solves"])
    assert [len(solve["residual"][0]) for solve in made.told["solves"]] == [4, 4, 4]
    assert json.loads(json.dumps(made.told)) == made.told


@pytest.mark.parametrize("schedule", [Schedule(4, step_size=0.3), Schedule(4, 4, step_size=0.05, momentum=0.5)])
def test_an_interrupted_solve_goes_on_bit_for_bit_in_whichever_segment_it_was(work, found, monkeypatch, schedule):
    monkeypatch.setitem(NAMED, "paper", schedule)
    method, states = AstraSource(schedule="paper", tolerance=1e-12, segments=3), []
    whole = method.directions(replace(work, on_step=lambda state: states.append({n: t.clone() for n, t in state.items()})), found)
    assert {int(state["segment"]) for state in states} == {0, 1, 2}
    for state in states:
        resumed = method.directions(replace(work, state=state, on_step=lambda _: None), found)
        assert resumed.told == whole.told
        for ours, theirs in zip(resumed.passes, whole.passes, strict=True):
            assert torch.equal(flat_of(work, ours), flat_of(work, theirs))


def test_it_is_near_source_where_training_stopped_early(monkeypatch):
    """1/(s + 1/t) against (1 - exp(-t s))/s: the same at both ends, at most 30% apart between them, as the paper has it."""
    monkeypatch.setitem(NAMED, "paper", Schedule(3000))
    trained = train("softmax")
    segments = cut(trained.trajectory, 3)
    method = AstraSource(schedule="paper", tolerance=1e-8, segments=3, fisher="exact")
    ours = source(trained, method, segments)
    theirs = source(trained, FastSource(segments=3, fisher="exact"), segments)
    for one, other, truth in zip(ours, theirs, trained.truth, strict=True):
        assert float(np.corrcoef(one, other)[0, 1]) > 0.99
        assert float(np.corrcoef(one, truth)[0, 1]) > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "papr"}, "'tuned', 'paper', 'paper-convnet' or 'paper-gpt2'"),
        ({"batch_size": 8}, 'batch_size = 8: schedule "tuned" takes all examples .* or choose "paper"'),
        ({"batch_size": 0}, 'batch_size must be "full" or a whole number of at least 1, got 0'),
        ({"tolerance": 2}, "tolerance"),
        ({"segments": 0}, "segments must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        AstraSource(**options)


def test_its_schedules_are_astras():
    assert set(get_args(ScheduleName)) == set(NAMED)


def test_what_a_solve_holds_for_a_query_is_counted():
    assert (AstraSource(segments=4).passes, AstraSource(segments=4).vectors) == (4, 14)


def test_a_schedule_that_diverges_in_a_short_segment_is_told_in_options_of_this_method(work, found):
    """Its step size is lambda = 1 / horizon."""
    short = replace(work, segments=(*SEGMENTS[:2], Segment((), 20, 30, 0.01, 0.0)))
    with pytest.raises(InputError, match=r"^astra_source, segment 2 \(steps 20..30, lambda = 100\): astra diverged at step \d+") as refused:
        AstraSource(schedule="paper-gpt2", segments=3, tolerance=1e-9).directions(short, found)
    said = str(refused.value)
    assert 'choose schedule = "tuned", or fewer, longer segments' in said
    assert all(word not in said for word in ("step_size", "max_steps", "\n"))
    advised = AstraSource(segments=3, tolerance=1e-9).directions(short, found)
    assert all(all(solve["converged"]) for solve in advised.told["solves"])


def test_other_errors_of_a_solve_are_passed_on_as_they_are(work, found, monkeypatch):
    def refuses(*_, **__):
        raise InputError("the model cannot be differentiated; write it otherwise")

    monkeypatch.setattr(module, "astra", refuses)
    with pytest.raises(InputError, match="the model cannot be differentiated; write it otherwise"):
        AstraSource().directions(work, found)
