"""For each kind of layer: the captured gradients are autograd's, and directions and scores are those of dense matrices written out."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tda.blocks import example_gradients, to_parameters
from tda.modules import inspect
from tests import dense
from tests.tda.layers import LAYERS, Layer, blocks, conv, reals, sequence
from tests.tda.pipeline import Given, attribute, relative
from tests.tda.reference import SEED, TRAIN, call, class_loss, dense_run, grouped, problem_of, record

#: Multiples of each layer's mean eigenvalue. At the least of them the inverse magnifies the smallest directions a million times.
SHARES = (1e-6, 1e-3, 1e-1)
#: Behind norms and attention the largest eigenvalue is 40 x the mean, so at 1e-6 the condition number is 4e7 and float64 itself keeps 1e-8.
WHOLE = ("GPT-2", "GPT-NeoX", "TransformerEncoderLayer, sequence first")
#: Labels drawn from the model differ from the data's in nothing but their values: shown where the drawing differs.
SAMPLED = ("Linear", "Conv2d dilated", "Linear over masked tokens", "LayerNorm", "Embedding", "Embedding tied to Linear", "GPT-NeoX")


@pytest.mark.parametrize("name", LAYERS)
def test_captured_gradients_are_autograds_one_example_at_a_time(name):
    layer = LAYERS[name]
    model = layer.build()
    problem = problem_of(layer, model)
    attributed = inspect(problem, model, problem.train)
    parameters = dict(model.named_parameters())
    wanted = []
    for inputs, target in problem.train:
        loss = class_loss(call(layer, model, dense._batch(inputs)), target[None])
        wanted.append(torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True))
    for size in (1, 4, TRAIN):
        for start in range(0, TRAIN, size):
            ids = range(start, min(start + size, TRAIN))
            tape = attributed.tape(attributed.load(problem.train, ids))
            found = {}
            for block, pairs in zip(attributed.blocks, tape.pairs(tape.seed(layer.likelihood.loss)), strict=True):
                found |= to_parameters(block, example_gradients(block, pairs))
            assert found.keys() == parameters.keys()
            for k, key in enumerate(parameters):
                truth = torch.stack([wanted[i][k] for i in ids])
                torch.testing.assert_close(found[key], truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_each_parameter_belongs_to_the_block_that_its_operation_calls_for(name):
    layer = LAYERS[name]
    model = layer.build()
    problem = problem_of(layer, model)
    attributed = inspect(problem, model, problem.train)
    assert attributed.share == 1
    assert attributed.skipped == ()
    assert {n for b in attributed.blocks if b.direct for n in b.parameters} == layer.direct
    structures = {"full": "exact", "diagonal": "diagonal", "embedding": "embedding"}
    assert [b.structure for b in attributed.blocks] == [structures.get(g[0].kind, "kronecker") for g in grouped(layer.blocks)]
    assert [b.groups for b in attributed.blocks] == [len(g) for g in grouped(layer.blocks)]
    assert all(("one example at a time" in b.reason) == b.direct for b in attributed.blocks)


CASES = [(name, "empirical") for name in LAYERS]
CASES += [(name, "exact") for name, layer in LAYERS.items() if not layer.tokens]
CASES += [(name, "sampled") for name in SAMPLED]


@pytest.mark.parametrize(("name", "fisher"), CASES)
def test_directions_and_scores_are_those_of_dense_inverses_and_plain_gradient_products_are_not(name, fisher):
    layer = LAYERS[name]
    model = layer.build()
    problem = problem_of(layer, model)
    passes = record(layer, model, problem, fisher)
    wanted = {(m, share): dense_run(passes, problem, layer.blocks, m, share) for m in ("ekfac", "kfac") for share in SHARES}
    methods = [{"name": m, "fisher": fisher, "damping": wanted[m, share][0]} for m, share in wanted]
    outcome = attribute(problem, [{"name": "graddot"}, *methods], batch_size=5, cuts=(6,), seed=SEED)
    graddot = outcome.influence[0]
    assert relative(graddot, dense.influence(passes, layer.blocks, "graddot")) < 1e-9
    for m, ((_, share), (_, directions, scores)) in enumerate(wanted.items(), start=1):
        tolerance = 1e-7 if name in WHOLE and share < 1e-3 else 1e-9
        for found, truth in zip(outcome.directions[m], directions, strict=True):
            assert relative(found.reshape(truth.shape), truth) < tolerance
        assert relative(outcome.influence[m], scores) < tolerance
        best = graddot * ((graddot * scores).sum() / graddot.square().sum())
        assert relative(best, scores) > 1e-3


@pytest.mark.parametrize("name", LAYERS)
def test_float32_agrees_with_dense_float64(name):
    """At damping 1e-1 of the mean eigenvalue: float32 keeps 1e-7 x the condition number, which at 1e-6 leaves nothing to compare.

    Two nearly equal eigenvalues of a Kronecker factor would do the same to EK-FAC: its basis turns by 1e-7 / their relative distance.
    """
    layer = LAYERS[name]
    model = layer.build()
    problem = problem_of(layer, model)
    passes = record(layer, model, problem, "empirical")
    wanted = {m: dense_run(passes, problem, layer.blocks, m, 1e-1) for m in ("ekfac", "kfac")}
    methods = [{"name": m, "fisher": "empirical", "damping": wanted[m][0]} for m in wanted]
    outcome = attribute(Given(model.float(), layer.likelihood, problem.train, problem.queries, predict=layer.predict), methods)
    assert outcome.influence.dtype == torch.float32
    for found, (_, _, scores) in zip(outcome.influence, wanted.values(), strict=True):
        assert relative(found, scores) < 1e-4


# Shapes that nobody chose.


def agrees_with_dense(layer, batch, cuts):
    """Gradients to 1e-10, EK-FAC and K-FAC scores to 1e-9 at damping 1e-3 of the mean eigenvalue, under the exact Fisher."""
    model = layer.build()
    problem = problem_of(layer, model)
    passes = record(layer, model, problem, "exact")
    wanted = [dense_run(passes, problem, layer.blocks, m, 1e-3) for m in ("ekfac", "kfac")]
    methods = [{"name": m, "fisher": "exact", "damping": w[0]} for m, w in zip(("ekfac", "kfac"), wanted, strict=True)]
    found = attribute(problem, [{"name": "graddot"}, *methods], batch_size=batch, cuts=cuts, seed=SEED)
    assert not any(b.direct for b in found.attributed.blocks)
    assert relative(found.influence[0], dense.influence(passes, layer.blocks, "graddot")) < 1e-10
    for scores, (_, _, truth) in zip(found.influence[1:], wanted, strict=True):
        assert relative(scores, truth) < 1e-9


RUN = {"batch": st.integers(1, TRAIN), "cuts": st.sets(st.integers(1, TRAIN - 1), max_size=3).map(sorted)}


@settings(max_examples=15, deadline=None)
@given(into=st.integers(1, 6), width=st.integers(1, 5), bias=st.booleans(), tokens=st.integers(0, 4), **RUN)
def test_linear_layers_of_any_shape_agree_with_dense_matrices(into, width, bias, tokens, batch, cuts):
    shape, size = ((tokens, into), tokens * width) if tokens else ((into,), width)
    model = sequence(lambda: nn.Linear(into, width, bias=bias), nn.Tanh, nn.Flatten, lambda: nn.Linear(size, 3, bias=bias))
    agrees_with_dense(Layer(model, reals(*shape), blocks("linear 0", "linear 3")), batch, cuts)


@settings(max_examples=15, deadline=None)
@given(
    groups=st.integers(1, 3),
    each=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    **RUN,
)
def test_convolutions_of_any_shape_agree_with_dense_matrices(*, groups, each, kernel, stride, padding, dilation, mode, bias, batch, cuts):
    height, width = 4, 5
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in zip((height, width), padding, dilation, kernel, strict=True)))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode, "groups": groups, "bias": bias}
    into, out = (groups * n for n in each)
    agrees_with_dense(conv(lambda: nn.Conv2d(into, out, kernel, **options), out, into, height, width, groups=groups), batch, cuts)
