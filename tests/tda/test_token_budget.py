"""Batches by a budget of tokens: every example once, little padding, and the same numbers whatever an example's batch mates."""

import numpy as np
import pytest
import torch

import tda
from tda.curvature.fit import fit_factors
from tda.data import Budget, batches, in_order, lengths_of
from tda.directions import dense, query_gradients, query_measurements
from tda.methods import parse
from tda.methods.work import Work
from tda.modules import inspect
from tda.scoring import Scorer, score
from tests.tda import language_models as tiny


def test_every_example_is_in_one_batch_of_at_most_the_budget_and_its_place_is_known():
    lengths = np.random.default_rng(0).integers(1, 40, 200)
    ids = range(20, 180)
    parts = list(batches(ids, Budget(64, lengths)))
    assert sorted(i for part in parts for i in part) == list(ids)
    assert all(len(part) * max(lengths[part]) <= 64 for part in parts)
    order = in_order(ids, parts)
    assert [i for part in parts for i in part] != list(ids)
    assert torch.tensor([i for part in parts for i in part])[order].tolist() == list(ids)
    padded = sum(len(part) * max(lengths[part]) for part in parts)
    assert padded < 1.1 * lengths[20:180].sum() < 0.8 * sum(len(p) * max(lengths[list(p)]) for p in batches(ids, 8))


def test_an_example_beyond_the_budget_is_alone_and_examples_of_one_length_stay_in_order():
    assert list(batches(range(3), Budget(4, np.array([9, 2, 2])))) == [[1, 2], [0]]
    parts = list(batches(range(5), Budget(6, np.full(5, 3))))
    assert parts == [[0, 1], [2, 3], [4]]
    assert in_order(range(5), parts) is None


@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_scores_gradients_and_factors_are_the_same_whatever_the_batch_mates(tmp_path, name):
    problem = tiny.causal(tmp_path, name=name)
    attributed = inspect(problem, tiny.drawn(tiny.CAUSAL[name], problem.model().config).double(), problem.train_data())
    assert _numbers(problem, attributed, 1)[2].abs().max() > 0
    for alone, together in zip(_numbers(problem, attributed, 1), _numbers(problem, attributed, 14), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12 * float(alone.abs().max()))


def _numbers(problem, attributed, tokens):
    """Measurements, query gradients, influence, self-influence, losses; at 1 token, every example is alone."""
    train, queries = problem.train_data(), problem.query_data()
    of = {split: Budget(tokens, lengths_of(problem, split, len(data))) for split, data in (("train", train), ("query", queries))}
    factors = fit_factors(attributed, train, fisher="sampled", seed=3, batch_size=of["train"])
    gradients, values = query_gradients(attributed, queries, range(2), batch_size=of["query"])
    torch.testing.assert_close(query_measurements(attributed, queries, range(2), batch_size=of["query"]), values, rtol=1e-12, atol=0)
    method = parse({"name": "ekfac", "damping": 1.0})
    made = method.directions(Work(attributed, train, [factors], 0, 2), gradients).passes[0]
    scorer = Scorer("ekfac", made, torch.ones_like(values), method.own([factors]))
    found = score(attributed, [scorer], train, range(1, 5), examples=5, batch_size=of["train"])
    flat = torch.cat([dense(gradient).flatten(1) for gradient in gradients], 1)
    return values, flat, found.influence, found.self_influence, found.loss


def test_lengths_are_those_of_the_examples(tmp_path):
    for options in ({}, {"packing": True, "max_length": 7}, {"truncate": True, "max_length": 4}):
        problem = tiny.causal(tmp_path, **options)
        for split, data in (("train", problem.train_data()), ("query", problem.query_data())):
            told = lengths_of(problem, split, len(data))
            assert told.tolist() == [len(data[i][0]["input_ids"]) for i in range(len(data))]


def test_lengths_that_do_not_fit_the_data_are_refused(tmp_path, monkeypatch):
    problem = tiny.causal(tmp_path)
    for wrong in ([3, 4], [3.0] * 5, [3, 4, 0, 2, 1]):
        monkeypatch.setattr(type(problem), "lengths", lambda *_, wrong=wrong: wrong)
        with pytest.raises(tda.InputError, match=r"lengths\('train'\) must be 5 whole numbers above 0"):
            lengths_of(problem, "train", 5)
