"""SOURCE against differentiating through a training loop, and against explicit matrix exponentials. All in float64."""

import json
import math
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from tda import Categorical, Gaussian, checkpoint
from tda.attributed import Attributed
from tda.blocks import to_matrix
from tda.curvature.covariances import Covariance, covariance_sums
from tda.curvature.eigen import Factor, decompose, eigenvalue_sums
from tda.curvature.fit import fit_factors
from tda.curvature.unrolled import respond, survive
from tda.directions import Dense, dense, query_gradients
from tda.methods import source as module
from tda.methods.ekfac import EKFAC
from tda.methods.source import FastSource, Source
from tda.methods.work import Made, Work
from tda.modules import inspect
from tda.trajectory import Recorder, Segment, Trajectory, average, cut
from tests.tda.pipeline import Given, relative

EXAMPLES, QUERIES, FEATURES, OUTPUTS = 12, 3, 4, 3
MOMENTUM, WEIGHT_DECAY, STEPS, EVERY = 0.8, 0.02, 600, 5


class Whole(nn.Module):
    """A linear map whose weights are one vector: its curvature is one full block, without a Kronecker structure."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(FEATURES * OUTPUTS, dtype=torch.float64))

    def forward(self, x):
        return x @ self.w.view(FEATURES, OUTPUTS)


def learning_rate(step):
    """Falls in the course of the training."""
    return 0.004 if step < STEPS // 2 else 0.001


@dataclass(frozen=True)
class Trained:
    """A problem whose model was trained, its trajectory with all checkpoints, and d f_q(w_T) / d eps_i by autograd: (query, train)."""

    problem: Given
    trajectory: Trajectory
    states: dict[str, bytes]
    truth: torch.Tensor

    def at(self, name: str) -> Attributed:
        return self.of(checkpoint.parse(self.states[name], name))

    def of(self, state) -> Attributed:
        model = type(self.problem.given)() if isinstance(self.problem.given, Whole) else nn.Linear(FEATURES, OUTPUTS).double()
        model.load_state_dict(state)
        return inspect(self.problem, model, self.problem.train)


@cache
def train(kind: str) -> Trained:
    """Full-batch gradient descent with momentum, weight decay and a schedule, written out so that autograd goes through all of it.

    "softmax": softmax regression, whose Hessian is its Fisher and turns as the weights move; one full block. "linear": a linear layer
    with squared error, for which EK-FAC is exact.
    """
    torch.manual_seed(0)
    inputs = torch.randn(EXAMPLES + QUERIES, FEATURES, dtype=torch.float64) * torch.tensor([3.0, 2.0, 1.0, 0.5])
    if kind == "softmax":
        model, likelihood = Whole(), Categorical()
        targets = torch.randint(OUTPUTS, (EXAMPLES + QUERIES,))
        loss = lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none")  # noqa: E731
    else:
        model, likelihood = nn.Linear(FEATURES, OUTPUTS).double(), Gaussian()
        inputs = inputs / 3
        targets = torch.randn(EXAMPLES + QUERIES, OUTPUTS, dtype=torch.float64)
        loss = lambda outputs, targets: 0.5 * (outputs - targets).square().sum(1)  # noqa: E731
    every = list(zip(inputs, targets, strict=True))
    problem = Given(model, likelihood, every[:EXAMPLES], every[EXAMPLES:])
    states: dict[str, bytes] = {}
    recorder = Recorder(model, states.__setitem__, states.__delitem__, kept=1000)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    speed = {name: torch.zeros_like(p) for name, p in weights.items()}
    eps = torch.zeros(EXAMPLES, dtype=torch.float64, requires_grad=True)

    def losses(some):
        return loss(torch.func.functional_call(model, weights, (inputs[some],)), targets[some])

    for step in range(STEPS):
        objective = ((1 + eps) * losses(slice(EXAMPLES))).sum() / EXAMPLES
        gradients = torch.autograd.grad(objective, list(weights.values()), create_graph=True)
        for (name, w), gradient in zip(list(weights.items()), gradients, strict=True):
            speed[name] = MOMENTUM * speed[name] + gradient + WEIGHT_DECAY * w
            weights[name] = w - learning_rate(step) * speed[name]
        if (step + 1) % EVERY == 0:
            model.load_state_dict({name: w.detach() for name, w in weights.items()})
            recorder(model=model, learning_rate=learning_rate(step), step=step + 1, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    measured = losses(slice(EXAMPLES, None))
    truth = torch.stack([torch.autograd.grad(f, eps, retain_graph=True)[0] for f in measured])
    return Trained(problem, recorder.finish(model), states, truth)


@pytest.fixture(scope="module", params=["softmax", "linear"])
def trained(request) -> Trained:
    return train(request.param)


def pooled(trained: Trained, attributeds: list[Attributed]) -> tuple[Factor, ...]:
    """Factors of the mean Fisher over checkpoints."""
    options = {"fisher": "exact", "seed": 0, "batch_size": 5}
    data, ids, count = trained.problem.train, range(EXAMPLES), EXAMPLES * len(attributeds)
    sums = [covariance_sums(each, data, ids, **options) for each in attributeds]
    total = [Covariance(*(sum(getattr(c, f) for c in each) for f in ("out", "in_", "positions"))) for each in zip(*sums, strict=True)]
    factors = [decompose(b, c, count, torch.float64) for b, c in zip(attributeds[0].blocks, total, strict=True)]
    squares = [eigenvalue_sums(each, factors, data, ids, **options) for each in attributeds]
    return tuple(replace(f, eigenvalues=sum(each) / count) for f, each in zip(factors, zip(*squares, strict=True), strict=True))


def gradients(trained: Trained, attributed: Attributed) -> torch.Tensor:
    """Training gradients in the layout of the first block, (train, D): the models here have one block."""
    model, (block,) = attributed.model, attributed.blocks
    rows = []
    for example in trained.problem.train:
        x, y = (t[None] for t in example)
        loss = attributed.problem.likelihood.loss(model(x), y).sum()
        found = torch.autograd.grad(loss, [model.get_parameter(name) for name in block.parameters])
        rows.append(to_matrix(block, dict(zip(block.parameters, found, strict=True))).flatten())
    return torch.stack(rows)


def met_by(trained: Trained, method: Source, segments: tuple[Segment, ...]) -> list[list[Attributed]]:
    """The models whose training gradients each segment's directions meet."""
    if not isinstance(method, FastSource):
        return [[trained.at(name) for name in segment.checkpoints] for segment in segments]
    states = [[checkpoint.parse(trained.states[name], name) for name in segment.checkpoints] for segment in segments]
    return [[trained.of(average(each))] for each in states]


def made_of(trained: Trained, method: Source, segments: tuple[Segment, ...]) -> Made:
    """The directions of all queries."""
    final, checkpoints = trained.of(trained.problem.given.state_dict()), met_by(trained, method, segments)
    fits = [pooled(trained, each) for each in checkpoints]
    found, _ = query_gradients(final, trained.problem.queries, range(QUERIES), batch_size=2)
    work = Work(final, trained.problem.train, fits, 0, 5, segments=segments)
    if isinstance(method, FastSource):
        work = replace(work, averaged=tuple(each for (each,) in checkpoints))
    return method.directions(work, found)


def source(trained: Trained, method: Source, segments: tuple[Segment, ...]) -> torch.Tensor:
    """SOURCE's scores (query, train)."""
    passes = made_of(trained, method, segments).passes
    assert len(passes) == len(segments)
    total = torch.zeros(QUERIES, EXAMPLES, dtype=torch.float64)
    for (direction,), each in zip(passes, met_by(trained, method, segments), strict=True):
        met = torch.stack([gradients(trained, one) for one in each]).mean(0)
        total += dense(direction).flatten(1) @ met.T / EXAMPLES
    return total


def test_the_full_block_of_softmax_regression_has_the_hessian_for_its_fisher():
    trained = train("softmax")
    attributed = trained.at(trained.trajectory.saved[40].name)
    (factor,) = pooled(trained, [attributed])
    assert attributed.blocks[0].structure == "exact"
    data = [torch.stack(each) for each in zip(*trained.problem.train, strict=True)]

    def objective(w):
        return functional.cross_entropy(data[0] @ w.view(FEATURES, OUTPUTS), data[1])

    wanted = torch.autograd.functional.hessian(objective, attributed.model.w.detach())
    found = factor.basis_out[0] @ torch.diag(factor.eigenvalues[0, :, 0]) @ factor.basis_out[0].T
    assert relative(found, wanted) < 1e-12


@pytest.mark.parametrize("method", [Source, FastSource])
def test_source_is_the_derivative_through_the_training_loop(trained, method):
    """What is left with many segments is that steps are no flow: eta and the start of the momentum are not infinitely small."""
    errors = [error(trained, method(fisher="exact", segments=count), cut(trained.trajectory, count)) for count in (3, 12, 30)]
    assert errors[0] < 0.005
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.001


def test_influence_functions_and_source_without_momentum_or_weight_decay_are_not_the_derivative(trained):
    """The training is stopped early, and its numbers are such that each part of the formula is needed."""
    method, segments = Source(fisher="exact", segments=6), cut(trained.trajectory, 6)
    slow = tuple(replace(segment, horizon=segment.horizon * (1 - MOMENTUM)) for segment in segments)
    free = tuple(replace(segment, weight_decay=0.0) for segment in segments)
    assert error(trained, method, segments) < 0.003
    assert error(trained, method, slow) > 0.3
    assert error(trained, method, free) > 0.03
    end = replace(segments[-1], checkpoints=(trained.trajectory.saved[-1].name,), horizon=1e12)
    assert error(trained, method, (end,)) > 0.2  # influence


def test_a_damping_takes_the_place_of_the_weight_decay(trained):
    segments = cut(trained.trajectory, 3)
    free = tuple(replace(segment, weight_decay=0.0) for segment in segments)
    found = source(trained, Source(fisher="exact", damping=WEIGHT_DECAY), free)
    assert relative(found, source(trained, Source(fisher="exact"), segments)) < 1e-12


@pytest.mark.parametrize("queries", [1, 7])
def test_directions_are_products_of_matrix_exponentials_from_the_last_segment_backwards(queries, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 30)  # queries are taken in pieces
    model = nn.Linear(4, 3).double()
    train = [(torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)) for _ in range(6)]
    attributed = inspect(Given(model, Gaussian(), train), model, train)
    factors, segments = [random_factor() for _ in range(3)], [Segment((), 0, 1, t, d) for t, d in ((0.7, 0.1), (1.3, 0.0), (0.4, 0.3))]
    gradient = torch.randn(queries, 1, 3, 5, dtype=torch.float64)
    method = Source(fisher="exact", segments=3)
    made = method.directions(Work(attributed, train, [(f,) for f in factors], 0, 5, segments=tuple(segments)), [Dense(gradient)])
    unit = torch.eye(15, dtype=torch.float64)
    C = [matrix(factor) + segment.weight_decay * unit for factor, segment in zip(factors, segments, strict=True)]
    S = [torch.matrix_exp(-segment.horizon * c) for c, segment in zip(C, segments, strict=True)]
    R = [torch.linalg.solve(c, unit - s) for c, s in zip(C, S, strict=True)]
    wanted = [-R[0] @ S[1] @ S[2], -R[1] @ S[2], -R[2]]
    for (direction,), one in zip(made.passes, wanted, strict=True):
        assert relative(direction.matrix.flatten(1), gradient.flatten(1) @ one.T) < 1e-12
    # The order matters: these curvatures do not commute.
    assert relative(made.passes[0][0].matrix.flatten(1), -gradient.flatten(1) @ (R[0] @ S[2] @ S[1]).T) > 0.01
    assert [told["damping"] for told in made.told["segments"]] == [0.1, 0.0, 0.3]


@pytest.mark.parametrize("damping", [None, 0.25])
@pytest.mark.parametrize("method", [Source, FastSource])
def test_segments_are_told_as_json_and_their_dampings_nowhere_else(trained, method, damping):
    segments = cut(trained.trajectory, 2)
    told = json.loads(json.dumps(made_of(trained, method(fisher="exact", segments=2, damping=damping), segments).told))["segments"]
    assert [found["steps"] for found in told] == [[0, 300], [300, 600]]
    assert [found["horizon"] for found in told] == pytest.approx([300 * 0.004 / (1 - MOMENTUM), 300 * 0.001 / (1 - MOMENTUM)])
    assert [found["damping"] for found in told] == pytest.approx([WEIGHT_DECAY if damping is None else damping] * 2)
    assert [found["checkpoints"] for found in told] == [list(segment.checkpoints) for segment in segments]
    assert method(damping=damping).damping_of([]) is None


def test_one_long_segment_is_influence(trained):
    final = trained.of(trained.problem.given.state_dict())
    found, _ = query_gradients(final, trained.problem.queries, range(QUERIES), batch_size=2)
    factors = tuple(fit_factors(final, trained.problem.train, fisher="exact", batch_size=5))
    work = Work(final, trained.problem.train, [factors], 0, 5, segments=(Segment((), 0, 10, 1e9, WEIGHT_DECAY),))
    (mine,) = Source(fisher="exact", segments=1).directions(work, found).passes
    (influence,) = EKFAC(fisher="exact", damping=WEIGHT_DECAY).directions(work, found).passes
    assert relative(dense(mine[0]), dense(influence[0])) < 1e-12


def test_where_the_loss_is_flat_a_push_adds_up_for_as_long_as_training_lasts():
    model = nn.Linear(4, 3).double()
    train = [(torch.randn(4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)) for _ in range(6)]
    attributed = inspect(Given(model, Gaussian(), train), model, train)
    flat = replace(random_factor(), eigenvalues=torch.zeros(1, 3, 5, dtype=torch.float64))
    segments = tuple(Segment((), 0, 1, t, 0.0) for t in (0.7, 1.3))
    gradient = torch.randn(2, 1, 3, 5, dtype=torch.float64)
    made = Source(fisher="exact", segments=2).directions(Work(attributed, train, [(flat,)] * 2, 0, 5, segments=segments), [Dense(gradient)])
    for (direction,), horizon in zip(made.passes, (0.7, 1.3), strict=True):
        assert relative(direction.matrix, -horizon * gradient) < 1e-12


def test_responses_are_exact_from_no_curvature_to_much():
    values, horizon = torch.tensor([0.0, 1e-300, 1e-12, 1e-3, 1.0, 1e6]), 3.0
    wanted = [3.0, 3.0, 3.0, (1 - math.exp(-3e-3)) / 1e-3, 1 - math.exp(-3), 1e-6]
    assert torch.allclose(respond(values, horizon), torch.tensor(wanted, dtype=torch.float64), rtol=1e-7, atol=0)
    # Both obey the flow that they sum up: a push that goes on, and curvature that pulls back.
    assert torch.allclose(respond(values, horizon) * values, 1 - survive(values, horizon), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": 0}, "segments must be a number >= 1, or the list of the steps at which they stop, got 0"),
        ({"segments": []}, "segments must be"),
        ({"segments": [3, 2.5]}, "segments must be"),
        ({"segments": True}, "segments must be"),
        ({"segments": [5, 2]}, r"segments = \[5, 2\]: the steps at which segments stop must rise"),
        ({"segments": [5, 5]}, "must rise"),
        ({"per_segment": 0}, "per_segment"),
        ({"damping": -1}, "damping must be a finite number >= 0"),
        ({"damping": "heuristic"}, "leave it out to take the training's weight decay"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        Source(**options)


def test_each_segment_has_a_fit_of_its_own():
    assert [fit.segment for fit in Source(segments=2).fits] == [0, 1]
    assert [fit.key for fit in FastSource(segments=[5, 7, 9], fisher="exact").fits] == [f"exact, segment {k}" for k in range(3)]


@pytest.mark.parametrize("segments", [4, [5, 7, 8, 9]])
def test_what_is_held_for_a_query_grows_with_the_segments(segments):
    assert [(method(segments=segments).passes, method(segments=segments).vectors) for method in (Source, FastSource)] == [(4, 6)] * 2


def error(trained, method, segments):
    return relative(source(trained, method, segments), trained.truth)


def random_factor() -> Factor:
    """Of a linear layer with 4 inputs, a bias and 3 outputs."""
    bases = [torch.linalg.qr(torch.randn(1, n, n, dtype=torch.float64))[0] for n in (3, 5)]
    return Factor(*bases, torch.ones(1, 3, dtype=torch.float64), torch.ones(1, 5), torch.rand(1, 3, 5, dtype=torch.float64) * 3)


def matrix(factor: Factor) -> torch.Tensor:
    U = torch.kron(factor.basis_out[0].contiguous(), factor.basis_in[0].contiguous())
    return U @ torch.diag(factor.eigenvalues[0].flatten()) @ U.T
