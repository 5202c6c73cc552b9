"""Ranks and recalls of fact tracing are those that can be counted by hand, ties and all."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from tda import InputError
from tda.evaluation.tracing import bootstrap_queries, check_gold, expected_at_random, first_ranks, recalls
from tda.methods.sweep import expand


def golds(*ids):
    return [np.array(each) for each in ids]


def test_the_first_gold_document_counts():
    scores = np.array([[5.0, 4.0, 3.0, 2.0], [1.0, 2.0, 3.0, 4.0]])
    assert first_ranks(scores, golds([2, 3], [3])).tolist() == [3.0, 1.0]
    assert recalls(scores, golds([2, 3], [3]), k=3).tolist() == [0.5, 1.0]


def test_documents_of_one_score_share_their_expected_rank_and_their_chance_of_a_place():
    scores = np.zeros((1, 21))
    assert first_ranks(scores, golds([0])).tolist() == [11.0]  # (1 + 21) / 2, wherever the gold one stands
    assert first_ranks(np.array([[2.0, 2.0, 1.0]]), golds([0, 1])).tolist() == [1.0]  # gold ones alone tie: one of them is first
    assert recalls(scores, golds([0, 20])) == pytest.approx(10 / 21)
    scores[0, :5] = 1
    assert recalls(scores, golds([0, 20])) == pytest.approx((1 + 5 / 16) / 2)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=30), st.data())
def test_ranks_and_recalls_are_what_sorting_says(values, data):
    ids = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, unique=True))
    scores = np.array([values], float)
    level = np.flatnonzero(scores[0] == scores[0, ids].max()).tolist()
    # Every order of those that tie is as likely: the mean place of the first gold one over the places that the gold ones may have.
    tied = len(set(level) & set(ids))
    places = [min(chosen) for chosen in combinations(range(1, len(level) + 1), tied)] if comb(len(level), tied) < 5000 else []
    rank = first_ranks(scores, golds(sorted(ids)))[0]
    assert not places or rank == pytest.approx((scores[0] > scores[0, ids].max()).sum() + np.mean(places))
    assert tied > 1 or rank == rankdata(-scores[0])[ids].min()
    found = recalls(scores, golds(sorted(ids)), k=4)[0]
    noise = np.random.default_rng(0).random((400, len(values)))
    orders = np.argsort(-scores + 1e-6 * noise, 1)[:, :4]  # ties broken at random
    assert found == pytest.approx(np.isin(orders, ids).sum(1).mean() / len(ids), abs=0.12)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.data())
def test_better_scores_of_gold_documents_are_never_worse(count, data):
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores, ids = random.normal(size=(1, count)), [int(random.integers(count))]
    raised = scores.copy()
    raised[0, ids] += abs(random.normal())
    assert first_ranks(raised, golds(ids))[0] <= first_ranks(scores, golds(ids))[0]
    assert recalls(raised, golds(ids))[0] >= recalls(scores, golds(ids))[0]


def test_an_order_at_random_has_the_expectation_that_is_stated():
    gold, random = golds([3], [0, 1, 2, 7]), np.random.default_rng(0)
    scores = random.random((4000, 2, 30))
    found = np.array([[first_ranks(each, gold), recalls(each, gold)] for each in scores])
    assert expected_at_random(gold, 30) == pytest.approx([(1 / found[:, 0]).mean(), found[:, 1].mean()], abs=0.01)


def test_intervals_are_over_queries_and_paired():
    values = np.array([[[0.0, 1.0, 0.5, 0.25]] * 2, [[0.1, 1.1, 0.6, 0.35]] * 2])  # (method, seed, query)
    draws = bootstrap_queries(values, draws=2000)
    assert draws.shape == (2, 2000)
    np.testing.assert_allclose(draws[1] - draws[0], 0.1)
    assert draws[0].mean() == pytest.approx(values[0].mean(), abs=0.02)
    assert draws[0].std() == pytest.approx(values[0, 0].std() / 2, rel=0.1)


def test_gold_documents_that_are_missing_twice_there_or_unknown_are_refused_by_query():
    assert [ids.tolist() for ids in check_gold([[2, 0]], 3)] == [[0, 2]]
    for gold, said in (([[0], []], "query 1 has no gold"), ([[3]], "id 3, and documents are 0..2"), ([[1, 1]], "document 1 twice")):
        with pytest.raises(InputError, match=said):
            check_gold(gold, 3)


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(InputError, match="document 1 for query 0"):
        first_ranks(np.array([[0.0, np.nan]]), golds([0]))


def test_dampings_of_the_pretraining_can_be_swept():
    stage = {"problem": "a:B", "damping": [1e-8, 0.5]}
    found = expand([{"name": "multistage", "proximity": 1.0, "pretraining": stage}, {"name": "graddot"}])
    assert [each.family for each in found] == ["multistage", "multistage", "graddot"]
    assert [each.table.get("label") for each in found] == ["multistage-1e-08", "multistage-0.5", None]
    assert [each.table["pretraining"]["damping"] for each in found[:2]] == [1e-8, 0.5]
    with pytest.raises(InputError, match="sweep one of them"):
        expand([{"name": "multistage", "damping": [0.0, 1.0], "pretraining": stage}])
    with pytest.raises(InputError, match="names none"):
        expand([{"name": "multistage", "pretraining": {**stage, "damping": []}}])
