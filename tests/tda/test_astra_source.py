"""ASTRA-SOURCE against explicit Jacobians and matrix exponentials, in float64; and that an interrupted one goes on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tda import Categorical
from tda.blocks import to_matrix
from tda.curvature.fit import fit_factors
from tda.directions import dense, query_gradients
from tda.flat import flatten
from tda.methods.astra_source import AstraSource
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
    monkeypatch.setitem(NAMED, "whole", Schedule(3000))
    made = AstraSource(schedule="whole", tolerance=1e-10, segments=3).directions(work, found)
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


@pytest.mark.parametrize("schedule", [Schedule(4, step_size=0.3), Schedule(4, 4, step_size=0.05, momentum=0.5)])
def test_an_interrupted_solve_goes_on_bit_for_bit_in_whichever_segment_it_was(work, found, monkeypatch, schedule):
    monkeypatch.setitem(NAMED, "some", schedule)
    method, states = AstraSource(schedule="some", tolerance=1e-12, segments=3), []
    whole = method.directions(replace(work, on_step=lambda state: states.append({n: t.clone() for n, t in state.items()})), found)
    assert {int(state["segment"]) for state in states} == {0, 1, 2}
    for state in states:
        resumed = method.directions(replace(work, state=state, on_step=lambda _: None), found)
        assert resumed.told == whole.told
        for ours, theirs in zip(resumed.passes, whole.passes, strict=True):
            assert torch.equal(flat_of(work, ours), flat_of(work, theirs))


def test_it_is_near_source_where_training_stopped_early(monkeypatch):
    """1/(s + 1/t) against (1 - exp(-t s))/s: the same at both ends, at most 30% apart between them, as the paper has it."""
    monkeypatch.setitem(NAMED, "whole", Schedule(3000))
    trained = train("softmax")
    segments = cut(trained.trajectory, 3)
    method = AstraSource(schedule="whole", tolerance=1e-8, segments=3, fisher="exact")
    ours = source(trained, method, segments)
    theirs = source(trained, FastSource(segments=3, fisher="exact"), segments)
    for one, other, truth in zip(ours, theirs, trained.truth, strict=True):
        assert float(np.corrcoef(one, other)[0, 1]) > 0.99
        assert float(np.corrcoef(one, truth)[0, 1]) > 0.99


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "papr"}, "schedule must be one of paper, .*, got 'papr'"),
        ({"batch_size": 0}, 'batch_size must be "full" or a whole number of at least 1, got 0'),
        ({"tolerance": 2}, "tolerance"),
        ({"segments": 0}, "segments must be"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        AstraSource(**options)
