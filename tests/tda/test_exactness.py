"""Exact where theory says so, and the same however it is run."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tda import Categorical, Gaussian, TokenCategorical
from tda.blocks import to_matrix
from tda.curvature.eigen import Factor, rotate
from tda.curvature.inverse import inverse_eigenvalues
from tda.curvature.labels import uniforms
from tda.directions import query_gradients
from tda.methods import parse
from tda.modules import inspect
from tda.scoring import score_error
from tests import dense
from tests.dense import Block
from tests.tda.layers import LAYERS
from tests.tda.pipeline import Given, attribute, fit, relative

METHODS = [
    {"name": "graddot"},
    {"name": "gradcos"},
    {"name": "kfac", "fisher": "exact", "damping": 1e-3},
    {"name": "ekfac", "fisher": "exact"},
    {"name": "ekfac", "fisher": "sampled", "damping": 1e-3},
]


def classes(widths=(5, 6, 3), size=23, queries=4, bias=True, seed=0):
    torch.manual_seed(seed)
    layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b, bias=bias), nn.Tanh())][:-1]
    train, asked = (
        [(torch.randn(widths[0], dtype=torch.float64), torch.randint(0, widths[-1], ())) for _ in range(n)] for n in (size, queries)
    )
    return Given(nn.Sequential(*layers).double(), Categorical(), train, asked)


def matrices(factors):
    """The dense curvature (n, n) of each block with one group: K-FAC's and EK-FAC's."""
    for factor in factors:
        U = torch.kron(factor.basis_out[0].contiguous(), factor.basis_in[0].contiguous())
        yield tuple(U @ torch.diag(values[0].flatten()) @ U.T for values in (factor.kronecker, factor.eigenvalues))


def dense_fisher(problem, blocks, labels, loss):
    passes = dense.record(problem.given, loss, problem.train, [], blocks, labels=labels)
    return [dense.fisher(passes, block) for block in blocks]


def half_square(outputs, targets):
    return 0.5 * (outputs - targets).square().sum(1)


@pytest.mark.parametrize("bias", [True, False])
def test_kfac_is_the_gauss_newton_block_of_a_deep_linear_network_with_squared_error(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.Linear(4, 6), nn.Linear(6, 3, bias=bias)).double()
    train = [(torch.randn(5, dtype=torch.float64), torch.randn(3, dtype=torch.float64)) for _ in range(20)]
    problem = Given(model, Gaussian(), train)
    attributed = inspect(problem, model, train)
    factors = fit(attributed, train, [range(20)], fisher="exact")
    # The Gauss-Newton matrix by its definition: (1/N) sum_i J_i^T J_i, with J_i the Jacobian of the outputs.
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    for block, (kfac, ekfac) in zip(attributed.blocks, matrices(factors), strict=True):
        wanted = torch.zeros(block.size, block.size, dtype=torch.float64)
        for x, _ in train:
            jacobian = torch.func.jacrev(lambda p, x=x: torch.func.functional_call(model, p, (x[None],))[0])(parameters)
            J = to_matrix(block, {n: jacobian[n] for n in block.parameters}).flatten(1)
            wanted += J.T @ J / len(train)
        assert relative(kfac, wanted) < 1e-12
        # Lambda is exact in K-FAC's basis, so here it is K-FAC's own.
        assert relative(ekfac, wanted) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_ekfac_is_at_least_as_close_to_the_fisher_as_kfac_in_every_layer(seed):
    problem = classes(seed=seed)
    attributed = inspect(problem, problem.given, problem.train)
    factors = fit(attributed, problem.train, [range(23)], fisher="exact")
    blocks = [Block("linear", (b.name,)) for b in attributed.blocks]
    truths = dense_fisher(problem, blocks, dense.categorical_labels, lambda o, t: Categorical().loss(o, t))
    for truth, (kfac, ekfac) in zip(truths, matrices(factors), strict=True):
        assert float((ekfac - truth).norm()) < float((kfac - truth).norm())
        # Its trace is the Fisher's: no curvature is lost, only turned.
        assert float(torch.trace(ekfac)) == pytest.approx(float(torch.trace(truth)), rel=1e-12)


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_a_large_damping_makes_graddot_of_it(name):
    damping = 1e9
    graddot, found = attribute(classes(), [{"name": "graddot"}, {"name": name, "fisher": "exact", "damping": damping}]).influence
    assert relative(found * damping, graddot) < 1e-8
    assert torch.equal(found.argsort(1), graddot.argsort(1))


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 6), min_size=2, max_size=4).map(lambda w: [*w[:-1], w[-1] + 1]),
    bias=st.booleans(),
    size=st.integers(2, 24),
    batch=st.integers(1, 30),
    cuts=st.lists(st.integers(1, 23), max_size=3),
)
def test_scores_do_not_depend_on_batches_and_shards(widths, bias, size, batch, cuts):
    problem = classes(widths, size, bias=bias)
    whole = attribute(problem, METHODS, batch_size=size)
    cut = attribute(problem, METHODS, batch_size=batch, cuts=sorted({c for c in cuts if c < size}))
    for m in range(len(METHODS)):
        assert relative(cut.influence[m], whole.influence[m]) < 1e-12
        assert relative(cut.self_influence[m], whole.self_influence[m]) < 1e-12


@pytest.mark.parametrize("name", ["Conv2d reflect in 2 groups", "Embedding with padding", "Linear over masked tokens", "GPT-2", "LSTM"])
def test_scores_of_structured_models_do_not_depend_on_batches_and_shards(name):
    layer = LAYERS[name]
    problem = Given(layer.build(), layer.likelihood, layer.examples(17), layer.examples(3, seed=1), predict=layer.predict)
    methods = [{**m, "fisher": "sampled"} if m.get("fisher") else m for m in METHODS]
    whole, cut = attribute(problem, methods, batch_size=17), attribute(problem, methods, batch_size=4, cuts=(1, 6))
    assert relative(cut.influence, whole.influence) < 1e-12
    assert relative(cut.self_influence, whole.self_influence) < 1e-12


def test_a_repeated_call_gives_the_same_bytes_and_leaves_the_model_as_it_was():
    problem = classes()
    before = {k: v.clone() for k, v in problem.given.state_dict().items()}
    first, second = attribute(problem, METHODS), attribute(problem, METHODS)
    assert first.influence.numpy().tobytes() == second.influence.numpy().tobytes()
    assert first.self_influence.numpy().tobytes() == second.self_influence.numpy().tobytes()
    assert all(torch.equal(v, before[k]) for k, v in problem.given.state_dict().items())
    assert all(p.grad is None for p in problem.given.parameters())


def test_copies_of_an_example_have_scores_of_their_own_and_equal_ones():
    problem = classes()
    problem.train = problem.train + problem.train[:4]
    found = attribute(problem, METHODS, batch_size=6).influence
    assert found.shape[2] == 27
    assert relative(found[..., 23:], found[..., :4]) < 1e-13


def test_damping_is_not_accumulated_over_uses_of_the_same_factors():
    problem = classes()
    once = attribute(problem, METHODS[2:4])
    kept = {kind: [f.eigenvalues.clone() for f in each] for kind, each in once.factors.items()}
    again = attribute(problem, METHODS[2:4], factors=once.factors, attributed=once.attributed)
    assert torch.equal(once.influence, again.influence)
    assert all(torch.equal(f.eigenvalues, old) for kind, each in once.factors.items() for f, old in zip(each, kept[kind], strict=True))


def test_signs_of_eigenvectors_change_nothing():
    problem = classes()
    straight = attribute(problem, METHODS[2:4])

    def flipped(factor: Factor) -> Factor:
        signs = [torch.where(torch.arange(b.shape[-1]) % 2 == 0, 1.0, -1.0).double() for b in (factor.basis_out, factor.basis_in)]
        return Factor(factor.basis_out * signs[0], factor.basis_in * signs[1], factor.kfac_out, factor.kfac_in, factor.eigenvalues)

    factors = {kind: [flipped(f) for f in each] for kind, each in straight.factors.items()}
    turned = attribute(problem, METHODS[2:4], factors=factors, attributed=straight.attributed)
    assert relative(turned.influence, straight.influence) < 1e-13
    assert relative(turned.self_influence, straight.self_influence) < 1e-13


def test_a_factor_rotates_there_and_back_and_inverts_its_damped_curvature():
    problem = classes()
    attributed = inspect(problem, problem.given, problem.train)
    for factor, (_, ekfac) in zip(fits := fit(attributed, problem.train, [range(23)], fisher="exact"), matrices(fits), strict=True):
        matrix = torch.randn(3, 1, factor.kfac_out.shape[1], factor.kfac_in.shape[1], dtype=torch.float64)
        assert relative(rotate(factor, rotate(factor, matrix), back=True), matrix) < 1e-13
        inverse = rotate(factor, rotate(factor, matrix) * inverse_eigenvalues(factor, "ekfac", 1e-2), back=True).flatten(1)
        assert relative(inverse @ (ekfac + 1e-2 * torch.eye(len(ekfac), dtype=torch.float64)), matrix.flatten(1)) < 1e-10


def test_damping_of_zero_gives_the_pseudo_inverse():
    factor = Factor(None, None, torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[[0.0, 0.5], [4.0, 0.0]]]))
    assert torch.equal(inverse_eigenvalues(factor, "ekfac", 0.0), torch.tensor([[[0.0, 2.0], [0.25, 0.0]]]))


@pytest.mark.parametrize(
    "name", ["Linear", "Linear over tokens", "Conv2d in groups", "Embedding", "Embedding tied to Linear", "LSTM", "GPT-2"]
)
def test_self_influence_is_the_diagonal_of_the_influence_of_the_training_set_on_itself(name):
    layer = LAYERS.get(name) or LAYERS["Conv2d zeros in 2 groups"]
    train = layer.examples(13)
    problem = Given(layer.build(), layer.likelihood, train, train, predict=layer.predict)
    methods = [{**m, "fisher": "sampled"} if m.get("fisher") else m for m in METHODS]
    found = attribute(problem, methods)
    assert relative(found.self_influence, found.influence.diagonal(dim1=1, dim2=2)) < 1e-12


def test_gradcos_is_minus_the_cosine_of_the_gradients():
    problem = classes()
    graddot, gradcos = attribute(problem, METHODS[:2]).influence
    assert bool((gradcos.abs() <= 1).all())
    model, parameters = problem.given, list(problem.given.parameters())

    def gradient(x, y):
        loss = Categorical().loss(model(x[None]), y[None])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), parameters)])

    train, queries = (torch.stack([gradient(x, y) for x, y in each]) for each in (problem.train, problem.queries))
    assert relative(graddot, -queries @ train.T / len(train)) < 1e-12
    assert relative(gradcos, -nn.functional.cosine_similarity(queries[:, None], train[None], dim=2)) < 1e-12


# Labels drawn from the model.


def test_drawn_labels_belong_to_an_example_whatever_batch_it_is_in():
    together = uniforms(3, range(10), 2)
    apart = torch.cat([uniforms(3, [i], 2) for i in range(10)])
    assert torch.equal(together, apart)
    assert torch.equal(uniforms(3, [7, 2], 2), together[[7, 2]])
    assert not torch.equal(uniforms(4, range(10), 2), together)
    assert len(together.unique()) == 20


def test_padding_changes_no_drawn_token():
    assert torch.equal(uniforms(0, range(6), 9)[:, :4], uniforms(0, range(6), 4))
    logits = torch.randn(6, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(6, 9, dtype=torch.int64)
    targets[:, 4:] = -100
    likelihood = TokenCategorical()
    long = likelihood.sample(logits, targets, uniforms(0, range(6), 9))
    assert torch.equal(long[:, :4], likelihood.sample(logits[:, :4], targets[:, :4], uniforms(0, range(6), 4)))
    assert bool((long[:, 4:] == -100).all())


def test_the_sampled_fisher_nears_the_exact_one_as_examples_repeat():
    problem = classes(size=10)
    problem.train = problem.train * 400  # every copy has an id, hence a label, of its own
    attributed = inspect(problem, problem.given, problem.train)
    sampled, exact = (fit(attributed, problem.train, [range(4000)], fisher=kind, batch_size=500) for kind in ("sampled", "exact"))
    for a, b in zip(matrices(sampled), matrices(exact), strict=True):
        assert all(0 < float((x - y).norm() / y.norm()) < 0.1 for x, y in zip(a, b, strict=True))


# The separable form.


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3, 1e-6])
def test_the_separable_form_errs_by_no_more_than_its_tolerance_and_the_error_is_measured(tolerance):
    problem = classes((12, 16, 16, 4), size=60, queries=6)
    attributed = inspect(problem, problem.given, problem.train)
    factors = fit(attributed, problem.train, [range(60)], fisher="exact")
    gradients, _ = query_gradients(attributed, problem.queries, range(6), batch_size=6)
    method = parse({"name": "ekfac", "fisher": "exact", "separable": tolerance})
    short, exact = (
        [m.direction(b, f, g, "full") for b, f, g in zip(attributed.blocks, factors, gradients, strict=True)]
        for m in (method, method.model_copy(update={"separable": 0.0}))
    )
    error = score_error(attributed, problem.train, range(60), short, exact, batch_size=7)
    assert error <= tolerance
    separable, whole = attribute(
        problem, [{"name": "ekfac", "fisher": "exact", "separable": tolerance}, {"name": "ekfac", "fisher": "exact"}]
    ).influence
    assert error == pytest.approx(float((separable - whole).norm() / whole.norm()), rel=1e-6, abs=1e-12)
    assert np.isfinite(error)
