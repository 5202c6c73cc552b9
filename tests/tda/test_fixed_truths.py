"""The library's scores on the fixed cases are the stored truths, in float64 to 1e-6 and in float32 to 1e-3."""

import pytest
import torch

from tda import Categorical, TokenCategorical
from tda.modules import inspect
from tests import cases
from tests.tda.pipeline import Given, attribute

FISHERS = {"emp": "empirical", "exp": "exact"}
QUERIES = 8


def method(case, name):
    if name == "graddot":
        return {"name": name}
    kind, fisher, damping = name.split("_")
    value = {"heur": "heuristic", "fix": case.fix_damping, "d2": 0.01}[damping]
    return {"name": kind, "fisher": FISHERS[fisher], "damping": value, "label": name}


def pairs(inputs, targets):
    return list(zip(inputs, targets, strict=True))


def compare(truth, found, tolerance):
    assert float((found.double() - truth).norm() / truth.norm()) < tolerance
    assert float((found.double() - truth).abs().max() / truth.abs().max()) < tolerance


@pytest.mark.parametrize(
    ("name", "fishers", "dtype", "tolerance"),
    [
        ("d", ("emp", "exp"), torch.float64, 1e-6),
        ("d", ("emp", "exp"), torch.float32, 1e-3),
        ("D", ("emp", "exp"), torch.float64, 1e-6),
        ("D", ("emp", "exp"), torch.float32, 1e-3),
        ("C", ("emp",), torch.float64, 1e-6),
        ("C", ("exp",), torch.float32, 1e-3),  # the exact Fisher takes ten passes over the pixels
        pytest.param("C", ("exp",), torch.float64, 1e-6, marks=pytest.mark.soak),
    ],
    ids=lambda value: str(value).removeprefix("torch.") if isinstance(value, str | torch.dtype) else None,
)
def test_scores_are_the_stored_truths(name, fishers, dtype, tolerance):
    case = cases.load_case(name, dtype)
    train, queries = pairs(case.train_inputs, case.train_targets), pairs(case.query_inputs[:QUERIES], case.query_targets[:QUERIES])
    names = [n for n in case.truth if n == "graddot" or n.split("_")[1] in fishers]
    methods = [method(case, n) for n in names]
    found = attribute(Given(case.model, Categorical(), train, queries), methods, batch_size=256, selves=False)
    assert found.attributed.share == 1
    assert not any(block.direct for block in found.attributed.blocks)
    for key, scores in zip(names, found.influence, strict=True):
        compare(case.truth[key], scores, tolerance)


def tokens(ids):
    """The label of a position is the next token; the last has none."""
    return [(row, torch.cat([row[1:], row.new_tensor([-100])])) for row in ids]


def transformer(dtype):
    if reason := cases.available("T"):
        pytest.skip(reason)
    case = cases.load_case("T", dtype)
    problem = Given(case.model, TokenCategorical(), tokens(case.train_inputs), tokens(case.query_inputs[:QUERIES]))
    return case, problem, inspect(problem, case.model, problem.train, modules=cases.tracked_layers(case.model))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)], ids=["float64", "float32"])
def test_gradient_products_of_a_transformer_are_the_stored_truths(dtype, tolerance):
    case, problem, attributed = transformer(dtype)
    first = 12
    few = Given(case.model, problem.likelihood, problem.train[:first], problem.queries)
    found = attribute(few, [{"name": "graddot"}], batch_size=4, attributed=attributed, selves=False).influence[0]
    compare(case.truth["graddot"][:, :first], found * first / len(problem.train), tolerance)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_scores_of_a_transformer_are_the_stored_truths():
    case, problem, attributed = transformer(torch.float32)
    names = list(case.truth)
    found = attribute(problem, [method(case, n) for n in names], batch_size=16, attributed=attributed, selves=False)
    for key, scores in zip(names, found.influence, strict=True):
        compare(case.truth[key], scores, 1e-3)
