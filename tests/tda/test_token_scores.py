"""Scores of single tokens add up to the sequence's, whatever the layers, the method and the padding."""

import pytest
import torch

from tda import InputError
from tda.directions import Dense, Factored, dense, query_gradients
from tda.methods import parse
from tda.methods.work import Work
from tda.modules import inspect
from tda.results import NotStored
from tda.stored_tokens import joint_scores
from tda.token_scores import token_scores
from tests.tda import language_models as tiny
from tests.tda.layers import LAYERS
from tests.tda.pipeline import attribute
from tests.tda.reference import problem_of

METHODS = [{"name": "graddot"}, {"name": "ekfac", "fisher": "empirical", "damping": 1e-3}]


def agree(problem, attributed, ids):
    data = problem.train_data()
    outcome = attribute(problem, METHODS, attributed=attributed)
    for directions, scores in zip(outcome.directions, outcome.influence, strict=True):
        found = token_scores(attributed, [Dense(d) for d in directions], data, ids, examples=len(data))
        assert found.shape == (len(scores), len(ids), max(len(data[i][1]) for i in ids))
        assert float(found.abs().max()) > 0
        torch.testing.assert_close(found.sum(2), scores[:, ids], rtol=1e-10, atol=1e-10 * float(scores.abs().max()))
    return found


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_the_parts_of_tokens_sum_to_the_sequences_score_and_padding_has_none(tmp_path, name):
    problem = tiny.causal(tmp_path, name=name)
    model = tiny.drawn(tiny.CAUSAL[name], problem.model().config).double()
    found = agree(problem, inspect(problem, model, problem.train_data()), [4, 0, 3])
    assert (found[:, 0, 3:] == 0).all()
    assert (found[:, 0, :2] != 0).all()


@pytest.mark.parametrize("name", ["Embedding tied to Linear", "GPT-2", "GPT-NeoX"])
def test_they_do_for_tied_embeddings_and_learned_positions(name):
    layer = LAYERS[name]
    problem = problem_of(layer, layer.build())
    agree(problem, inspect(problem, problem.model(), problem.train_data()), [0, 5, 7])


def test_directions_of_low_rank_give_what_their_matrices_give(tmp_path):
    problem = tiny.causal(tmp_path)
    attributed = inspect(problem, tiny.drawn(tiny.CAUSAL["GPT-2"], problem.model().config).double(), problem.train_data(), modules=["mlp"])
    found, _ = query_gradients(attributed, problem.query_data(), [0, 1], batch_size=1)
    assert any(isinstance(direction, Factored) for direction in found)
    data = problem.train_data()
    low, whole = (token_scores(attributed, each, data, [0, 1], examples=5) for each in (found, [Dense(dense(d)) for d in found]))
    torch.testing.assert_close(low, whole, rtol=1e-12, atol=1e-12)


def test_labels_that_are_no_tokens_are_refused(tmp_path):
    problem = tiny.classifier(tmp_path)
    attributed = inspect(problem, problem.model(), problem.train_data())
    with pytest.raises(InputError, match=r"labels \(batch, tokens\)"):
        token_scores(attributed, [], problem.train_data(), [0], examples=5)


@pytest.mark.parametrize("method", [*METHODS, {"name": "kfac", "fisher": "empirical", "damping": 1e-3}])
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_parts_by_both_sides_tokens_sum_to_both_and_swap_with_the_roles(tmp_path, name, method):
    problem = tiny.causal(tmp_path, name=name)
    attributed = inspect(problem, tiny.drawn(tiny.CAUSAL[name], problem.model().config).double(), problem.train_data())
    data, parsed = problem.train_data(), parse(method)
    outcome = attribute(problem, [method], attributed=attributed)
    work = Work(attributed, data, [outcome.factors[fit.of] for fit in parsed.fits], seed=0, batch_size=2)
    both = joint_scores(work, parsed, 1, [4, 0, 3], examples=len(data))
    of_train = token_scores(attributed, [Dense(d) for d in outcome.directions[0]], data, [4, 0, 3], examples=len(data))[1]
    torch.testing.assert_close(both.sum(2), of_train, rtol=1e-10, atol=1e-12)
    # The curvature is symmetric and the measurement the loss: a training example in the query's place gives the same parts.
    queries = problem.query_data()
    problem.train_data, problem.query_data = lambda: queries, lambda: data
    swapped = joint_scores(work, parsed, 4, [1], examples=len(data))[0]
    length = len(data[4][1])
    torch.testing.assert_close(swapped.T, both[0, :length, : swapped.shape[0]], rtol=1e-9, atol=1e-12)


def test_the_parts_of_a_querys_tokens_need_factors(tmp_path):
    problem = tiny.causal(tmp_path)
    attributed = inspect(problem, problem.model(), problem.train_data())
    with pytest.raises(NotStored, match="known under graddot, kfac, ekfac and bif, not under 'cg'"):
        joint_scores(Work(attributed, None, [], 0, 1), parse({"name": "cg", "damping": 1.0}), 0, [0], examples=5)


@pytest.mark.parametrize("method", [{"name": "graddot"}, {"name": "kfac", "fisher": "empirical", "damping": 1e-3}, METHODS[1]])
def test_parts_by_both_sides_tokens_are_of_directions_in_full_where_the_run_kept_a_low_rank(tmp_path, method):
    problem = tiny.causal(tmp_path)
    attributed = inspect(problem, tiny.drawn(tiny.CAUSAL["GPT-2"], problem.model().config).double(), problem.train_data(), modules=["mlp"])
    data, short = problem.train_data(), parse(method | {"query_rank": 1})
    outcome = attribute(problem, [method], attributed=attributed)
    work = Work(attributed, data, [outcome.factors[fit.of] for fit in short.fits], seed=0, batch_size=2)
    both = joint_scores(work, short, 1, [4, 0, 3], examples=len(data))
    torch.testing.assert_close(both.sum((1, 2)), outcome.influence[0][1, [4, 0, 3]], rtol=1e-10, atol=1e-12)


def test_directions_stored_in_bfloat16_are_met_in_the_models_dtype(tmp_path):
    problem = tiny.causal(tmp_path)
    attributed = inspect(problem, tiny.drawn(tiny.CAUSAL["GPT-2"], problem.model().config), problem.train_data())
    found, _ = query_gradients(attributed, problem.query_data(), [0, 1], batch_size=1)
    assert any(isinstance(direction, Factored) for direction in found)
    data = problem.train_data()
    for each in (found, [Dense(dense(direction)) for direction in found]):
        short = [Dense(d.matrix.bfloat16()) if isinstance(d, Dense) else Factored(d.left.bfloat16(), d.right.bfloat16()) for d in each]
        whole, rounded = (token_scores(attributed, directions, data, [0, 1], examples=5) for directions in (each, short))
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, whole, rtol=0, atol=0.02 * float(whole.abs().max()))
