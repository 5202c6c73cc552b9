"""TRAK against its published formula, computed densely; its projections against the definition of one."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tda import Bernoulli, Categorical, Gaussian, InputError, TokenCategorical, scoring, self_products
from tda import projection as module
from tda.blocks import to_matrix
from tda.curvature.spectrum import Spectrum, decompose
from tda.directions import Dense, dense, query_gradients
from tda.flat import flatten, unflatten
from tda.methods import parse
from tda.methods.trak import gram_sums, output_function
from tda.methods.work import Work
from tda.modules import inspect
from tda.projection import Projection, lift, project, project_examples
from tda.scoring import Scorer, score
from tests.tda.pipeline import Given, relative

TRAIN, QUERIES, CLASSES = 30, 4, 3


@pytest.fixture(params=["mlp", "conv"])
def problem(request) -> Given:
    torch.manual_seed(0)
    if request.param == "mlp":
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, CLASSES))
        inputs = torch.randn(TRAIN + QUERIES, 5)
    else:
        model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES))
        inputs = torch.randn(TRAIN + QUERIES, 2, 4, 4)
    each = list(zip(inputs.double(), torch.randint(CLASSES, (TRAIN + QUERIES,)), strict=True))
    return Given(model.double(), Categorical(), each[:TRAIN], each[TRAIN:])


def jacobian(attributed, data, function) -> torch.Tensor:
    """Gradients (example, D) of a function of the outputs, by autograd, example by example."""
    rows, parameters = [], dict(attributed.model.named_parameters())
    for x, y in data:
        value = function(attributed.model(x[None]), y[None]).sum()
        each = dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))
        rows.append(torch.cat([to_matrix(block, each).flatten() for block in attributed.blocks]))
    return torch.stack(rows)


def log_odds(outputs, targets):
    p = outputs.softmax(1).gather(1, targets[:, None])[:, 0]
    return (p / (1 - p)).log()


def matrices(projection, attributed) -> list[torch.Tensor]:
    """P of each part, column by column from unit vectors."""
    blocks = attributed.blocks
    size = sum(block.size for block in blocks)
    unit = [Dense(m) for m in unflatten(blocks, torch.eye(size, dtype=torch.float64))]
    return [rows.T for rows in project(projection, blocks, unit)]


def spectra(attributed, train, projection) -> tuple[Spectrum, ...]:
    sums = gram_sums(attributed, train, range(len(train)), projection, batch_size=7)
    return tuple(Spectrum((), *decompose(total / len(train))) for total in sums)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize(("dim", "limit"), [(12, 1 << 26), (12, 0), (10_000, 0)])
def test_trak_is_its_published_formula(problem, scope, dim, limit, monkeypatch):
    monkeypatch.setattr(module, "DENSE", limit)
    attributed = inspect(problem, problem.given, problem.train)
    method, damping = parse({"name": "trak", "projection_dim": dim, "scope": scope, "damping": 1e-4}), 1e-4
    projection = Projection(dim, 3, scope == "layer")
    gradients, _ = query_gradients(attributed, problem.queries, range(QUERIES), batch_size=3)
    work = Work(attributed, problem.train, [spectra(attributed, problem.train, projection)], 3, 7)
    (directions,) = method.directions(work, gradients).passes
    v = flatten(attributed.blocks, [dense(d) for d in directions])
    loss = jacobian(attributed, problem.train, lambda o, y: nn.functional.cross_entropy(o, y, reduction="none"))
    # The formula of the paper: features of log-odds, and what is left of the probability.
    train, query = (jacobian(attributed, data, log_odds) for data in (problem.train, problem.queries))
    losses = jacobian(attributed, problem.queries, lambda o, y: nn.functional.cross_entropy(o, y, reduction="none"))
    p = torch.stack([problem.given(x[None]).softmax(1)[0, y] for x, y in problem.train]).detach()
    q = torch.stack([problem.given(x[None]).softmax(1)[0, y] for x, y in problem.queries]).detach()
    wanted = torch.zeros(QUERIES, TRAIN, dtype=torch.float64)
    for P in matrices(projection, attributed):
        phi, phi_q = train @ P.T, query @ P.T
        kernel = torch.linalg.inv(phi.T @ phi + TRAIN * damping * torch.eye(len(P), dtype=torch.float64))
        wanted += phi_q @ kernel @ phi.T * (1 - p)
    assert relative(losses, -(1 - q)[:, None] * query) < 1e-9  # and so the measurement: here it is the loss, the paper's the log-odds
    assert relative(v @ loss.T / TRAIN, -(1 - q)[:, None] * wanted) < 1e-8


def test_the_gradient_of_the_loss_is_that_of_the_log_odds_times_what_is_left_of_the_probability(problem):
    attributed = inspect(problem, problem.given, problem.train)
    loss = jacobian(attributed, problem.train, lambda o, y: nn.functional.cross_entropy(o, y, reduction="none"))
    margins = jacobian(attributed, problem.train, output_function(Categorical()))
    p = torch.stack([problem.given(x[None]).softmax(1)[0, y] for x, y in problem.train]).detach()
    assert relative(-(1 - p)[:, None] * margins, loss) < 1e-12


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(("dim", "limit"), [(9, 1 << 26), (9, 0), (10_000, 0)])
def test_examples_and_queries_are_projected_by_one_matrix_whose_transpose_lifts(problem, per_layer, dim, limit, monkeypatch):
    monkeypatch.setattr(module, "DENSE", limit)
    monkeypatch.setattr(module, "GRADIENT_BYTES", 600)
    attributed, projection = inspect(problem, problem.given, problem.train), Projection(dim, 1, per_layer)
    blocks, P = attributed.blocks, matrices(projection, attributed)
    batch = attributed.load(problem.train, range(8))
    tape = attributed.tape(batch)
    found = project_examples(projection, blocks, tape.pairs(tape.seed(output_function(Categorical()))), 8)
    gradients = jacobian(attributed, problem.train[:8], log_odds)
    for rows, each in zip(found, P, strict=True):
        assert relative(rows, gradients @ each.T) < 1e-12
    features = [torch.randn(5, len(each), dtype=torch.float64) for each in P]
    lifted = flatten(blocks, lift(projection, blocks, features))
    assert relative(lifted, sum(f @ each for f, each in zip(features, P, strict=True))) < 1e-12


@pytest.mark.parametrize(("limit", "spread"), [(1 << 30, 0.15), (0, 0.3)])
def test_inner_products_are_nearly_kept(problem, limit, spread, monkeypatch):
    monkeypatch.setattr(module, "DENSE", limit)
    attributed = inspect(problem, problem.given, problem.train)
    gradients = jacobian(attributed, problem.train, log_odds)
    monkeypatch.setattr(Projection, "kind", lambda _self, _blocks, _part: "outer" if limit == 0 else "dense")  # more rows than parameters
    (P,) = matrices(Projection(4000, 0), attributed)
    off = gradients @ P.T @ P @ gradients.T - gradients @ gradients.T
    lengths = gradients.norm(dim=1)
    assert float((off / lengths[:, None] / lengths).abs().max()) < spread
    assert float((P.T @ P).diagonal().sub(1).abs().max()) < 1e-12


def test_a_row_of_signs_is_the_same_in_every_projection_and_belongs_to_seed_block_and_row(problem):
    attributed = inspect(problem, problem.given, problem.train)
    few, many, other = (matrices(Projection(dim, seed), attributed)[0] * dim**0.5 for dim, seed in ((4, 0), (8, 0), (8, 1)))
    assert torch.equal(few, many[:4])
    assert set(few.flatten().tolist()) == {-1.0, 1.0}
    assert not torch.equal(many, other)
    assert len({tuple(row) for row in many[:, : attributed.blocks[0].size].tolist()}) == 8


def test_without_damping_the_inverse_is_the_pseudo_inverse(problem):
    attributed, projection = inspect(problem, problem.given, problem.train), Projection(60, 0)
    (spectrum,) = spectra(attributed, problem.train, projection)
    gradients, _ = query_gradients(attributed, problem.queries, range(QUERIES), batch_size=3)
    method = parse({"name": "trak", "projection_dim": 60, "damping": 0})
    (directions,) = method.directions(Work(attributed, problem.train, [(spectrum,)], 0, 7), gradients).passes
    (P,) = matrices(projection, attributed)
    phi = jacobian(attributed, problem.train, log_odds) @ P.T
    assert len(phi) < len(P)
    query = flatten(attributed.blocks, [dense(g) for g in gradients])
    wanted = -query @ P.T @ torch.linalg.pinv(phi.T @ phi / TRAIN, rtol=1e-10, hermitian=True) @ P
    assert relative(flatten(attributed.blocks, [dense(d) for d in directions]), wanted) < 1e-6
    assert method.damping_of([(spectrum,)]) == 0
    heuristic = parse({"name": "trak", "projection_dim": 60})
    assert heuristic.damping_of([(spectrum,)]) == pytest.approx(0.1 * float(phi.square().sum() / TRAIN / len(P)))


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets"),
    [
        (Gaussian(), torch.randn(6, 1), torch.randn(6)),
        (Gaussian(), torch.randn(6, 3), torch.randn(6, 3)),
        (Bernoulli(), torch.randn(6, 1), torch.randint(2, (6, 1))),
    ],
)
def test_a_loss_depends_on_the_weights_by_its_output_function_alone(likelihood, outputs, targets):
    outputs = outputs.double().requires_grad_()
    loss, function = (f(outputs, targets) for f in (likelihood.loss, output_function(likelihood)))
    a, b = (torch.autograd.grad(each.sum(), outputs, retain_graph=True)[0] for each in (loss, function))
    cosines = nn.functional.cosine_similarity(a, b).abs()
    assert relative(cosines, torch.ones(6)) < 1e-12


def test_tokens_that_are_ignored_add_nothing_to_the_output_function():
    outputs, targets = torch.randn(2, 5, 4).double(), torch.tensor([[1, 2, -100, 3, -100], [0, -100, -100, -100, 2]])
    found = output_function(TokenCategorical())(outputs, targets)
    wanted = [sum(log_odds(o[None], y[None]) for o, y in zip(*row, strict=True) if y >= 0) for row in zip(outputs, targets, strict=True)]
    assert relative(found, torch.cat(wanted)) < 1e-12
    mean = output_function(TokenCategorical(reduction="mean"))(outputs, targets)
    assert relative(mean, torch.cat(wanted) / torch.tensor([3.0, 2.0])) < 1e-12


def test_a_likelihood_without_an_output_function_is_refused(problem):
    attributed = inspect(problem, problem.given, problem.train)
    with pytest.raises(InputError, match="trak knows no output function of the likelihood object"):
        parse({"name": "trak"}).check(replace(attributed, problem=Given(problem.given, object(), problem.train)))


@pytest.mark.parametrize(
    ("dim", "scope", "limit", "refused"),
    [(40_000, "global", "8GiB", False), (20, "global", 12_800, False), (20, "global", 12_799, True), (20, "layer", 12_799, True)],
)
def test_curvature_that_takes_too_much_memory_is_refused(problem, dim, scope, limit, refused):
    attributed = inspect(problem, problem.given, problem.train)
    method = parse({"name": "trak", "projection_dim": dim, "scope": scope, "memory_limit": limit})
    with pytest.raises(InputError, match=rf"^trak: projection_dim = {dim} takes .* above memory_limit") if refused else nullcontext():
        method.check(attributed)
    assert "memory_limit" not in method.determining()


class Largest(TorchDispatchMode):
    """The most numbers that any tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else [made]:
            self.numbers = max(self.numbers, one.numel() if torch.is_tensor(one) else 0)
        return made


@pytest.mark.parametrize("limit", [1 << 26, 0])
def test_self_influence_is_that_of_projected_gradients_and_keeps_none_of_a_whole_batch(limit, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 2)).double()
    examples = list(zip(torch.randn(24, 60).double(), torch.randint(2, (24,)), strict=True))
    given = Given(model, Categorical(), examples, examples)
    monkeypatch.setattr(module, "DENSE", limit)
    for other in (module, scoring, self_products):
        monkeypatch.setattr(other, "GRADIENT_BYTES", 8 * 60 * 50)
    attributed, projection = inspect(given, model, examples), Projection(4, 0)
    method, kept = parse({"name": "trak", "projection_dim": 4, "damping": 1e-3}), [spectra(attributed, examples, projection)]
    directions = [Dense(m) for m in unflatten(attributed.blocks, torch.ones(1, 3152, dtype=torch.float64))]
    (own,) = method.owns(attributed, kept, (), 0)
    scorer = Scorer("trak", directions, torch.ones(1), own)
    with Largest() as largest:
        found = score(attributed, [scorer], examples, range(24), examples=24, batch_size=24)
    assert largest.numbers < 5 * 3050, "24 gradients of 3152 numbers would be in memory at once"
    (P,) = matrices(projection, attributed)
    functions = (log_odds, lambda o, y: nn.functional.cross_entropy(o, y, reduction="none"))
    phi, psi = (jacobian(attributed, examples, function) @ P.T for function in functions)
    inverse = torch.linalg.inv(phi.T @ phi / 24 + 1e-3 * torch.eye(4, dtype=torch.float64))
    assert relative(found.self_influence[0], -((psi @ inverse) * psi).sum(1) / 24) < 1e-9
