"""What the dense reference says of a layer: its blocks' dampings, directions and scores, each matrix written out."""

from dataclasses import replace

import numpy as np
import torch
from torch.nn import functional

from tests import dense
from tests.tda.pipeline import Given

TRAIN, QUERIES, SEED = 40, 3, 5


def class_loss(outputs, targets):
    if outputs.ndim == 3:
        return functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").sum(1)
    return functional.cross_entropy(outputs, targets, reduction="none")


def problem_of(layer, model):
    predict = None if layer.predict is None else layer.predict
    return Given(model, layer.likelihood, layer.examples(TRAIN), layer.examples(QUERIES, seed=1), predict=predict)


def call(layer, model, inputs):
    return model(inputs) if layer.predict is None else layer.predict(model, inputs)


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
