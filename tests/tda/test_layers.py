"""For each kind of layer: the captured gradients are autograd's, and directions and scores are those of dense matrices written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from tda.blocks import to_parameters
from tda.modules import example_gradients, inspect
from tests import dense
from tests.tda.layers import LAYERS
from tests.tda.pipeline import Given, attribute, relative

TRAIN, QUERIES, SEED = 40, 3, 5
#: Multiples of each layer's mean eigenvalue. At the least of them the inverse magnifies the smallest directions a million times.
SHARES = (1e-6, 1e-3, 1e-1)
#: Behind norms and attention the largest eigenvalue is 40 x the mean, so at 1e-6 the condition number is 4e7 and float64 itself keeps 1e-8.
WHOLE = ("GPT-2", "GPT-NeoX", "TransformerEncoderLayer, sequence first")
#: Labels drawn from the model differ from the data's in nothing but their values: shown where the drawing differs.
SAMPLED = ("Linear", "Conv2d dilated", "Linear over masked tokens", "LayerNorm", "Embedding", "Embedding tied to Linear", "GPT-NeoX")


def class_loss(outputs, targets):
    if outputs.ndim == 3:
        return functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(1)
    return functional.cross_entropy(outputs, targets, reduction="none")


def problem_of(layer, model):
    predict = None if layer.predict is None else layer.predict
    return Given(model, layer.likelihood, layer.examples(TRAIN), layer.examples(QUERIES, seed=1), predict=predict)


def call(layer, model, inputs):
    return model(inputs) if layer.predict is None else layer.predict(model, inputs)


# The dense side.


def drawn_labels(layer, model, train):
    """By inversion of the distribution at the first uniform numbers of a Philox stream keyed by (seed, example id)."""
    labels = []
    for i, (inputs, target) in enumerate(train):
        p = call(layer, model, dense._batch(inputs))[0].detach().softmax(-1)
        uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=[SEED, i])).random(max(target.numel(), 1)))
        below = (p.cumsum(-1) < uniform.reshape(*target.shape, 1)).sum(-1)
        labels.append(torch.where(target == -100, -100, below))
    return labels


def record(layer, model, problem, fisher):
    labels = dense.categorical_labels if fisher == "exact" else dense.data_label
    drawn = drawn_labels(layer, model, problem.train) if fisher == "sampled" else None
    options = {"labels": labels, "drawn": drawn, "predict": lambda m, x: call(layer, m, x)}
    return dense.record(model, class_loss, problem.train, problem.queries, layer.blocks, **options)


def masked(passes, problem, block):
    """Masked positions, and an embedding's padding, are no positions of a layer: neither factor counts them."""
    if not block.structured or block.kind == "tied":
        return passes
    if block.kind == "embedding":
        padding = passes.model.get_submodule(block.names[0]).padding_idx
        return passes if padding is None else without(passes, block, [one.inputs[block.names[0]][0][0] != padding for one in passes.data])
    if isinstance(problem.train[0][0], dict) and len(dense.activations(passes.model, block, passes.data[0])) > 1:
        return without(passes, block, [inputs["attention_mask"] for inputs, _ in problem.train])
    return passes


def without(passes, block, marks):
    """The passes with only the marked positions of a block."""
    (name,), each = block.names, len(passes.fisher) // len(passes.data)
    data = [replace(one, mask=mark) for one, mark in zip(passes.data, marks, strict=True)]
    fisher = [
        replace(one, outputs=one.outputs | {name: [one.outputs[name][0] * marks[i // each][None, :, None]]})
        for i, one in enumerate(passes.fisher)
    ]
    return replace(passes, data=data, fisher=fisher)


def tied_factors(passes, block):
    """Rows of both uses pooled. The head's: s = output gradient, a = input; the embedding's: s = the token's unit vector, a = gradient."""
    tokens, width = passes.model.get_submodule(block.names[0]).weight.shape
    S, A, positions = torch.zeros(tokens, tokens, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64), 0
    for one in passes.data:
        ids, hidden = (one.inputs[name][0].flatten(0, 1) for name in block.names)
        hot = functional.one_hot(ids, tokens).double()
        S, A, positions = S + hot.T @ hot, A + hidden.T @ hidden, positions + len(ids) + len(hidden)
    for one in passes.fisher:
        into_embedding, into_logits = (one.outputs[name][0].flatten(0, 1) for name in block.names)
        S, A = S + one.weight * into_logits.T @ into_logits, A + one.weight * into_embedding.T @ into_embedding
    return S / len(passes.data), A / positions


def curvature(passes, block, method):
    if block.kind != "tied":
        return dense.curvature(passes, block, method)
    S, A = tied_factors(passes, block)
    if method == "kfac":
        return torch.kron(S, A)
    U = torch.kron(torch.linalg.eigh(S)[1], torch.linalg.eigh(A)[1])
    return U @ torch.diag(torch.diagonal(U.T @ dense.fisher(passes, block) @ U)) @ U.T


def grouped(blocks):
    """The groups of a convolution belong to one block of the library."""
    found = []
    for block in blocks:
        if block.group:
            found[-1].append(block)
        else:
            found.append([block])
    return found


def dense_run(passes, problem, blocks, method, share):
    """Dampings by block, directions by block (query, groups, n), scores (query, train)."""
    dampings, directions, scores = [], [], 0
    for group in grouped(blocks):
        each = [masked(passes, problem, b) for b in group]
        curvatures = [curvature(p, b, method) for p, b in zip(each, group, strict=True)]
        damping = share * float(np.mean([float(torch.trace(C)) / len(C) for C in curvatures]))
        inverses = [dense.inverse(C, damping) for C in curvatures]
        dampings.append(damping)
        queries = [dense.gradients(passes, b, "queries") for b in group]
        directions.append(torch.stack([-g @ M for g, M in zip(queries, inverses, strict=True)], 1))
        scores = scores + sum(dense.scores(passes, b, M) for b, M in zip(group, inverses, strict=True))
    return dampings, directions, scores


# The library's side against it.


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
