"""What is checked beside the LDS is right where it can be worked out by hand, and what cannot be split or left out is refused."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from tda import InputError
from tda.evaluation import checks, effects
from tda.evaluation.ceiling import ceiling
from tda.evaluation.lds import lds
from tda.evaluation.subsets import left_out, tuning, without
from tda.methods.sweep import expand


def test_mislabelled_examples_are_those_with_the_most_negative_self_influence():
    own = np.array([-9.0, -1.0, -8.0, -2.0, -3.0])
    found = checks.detect(own, np.array([1, 0, 1, 0, 0], bool), np.array([1, 2, 4]))
    assert found.auc == 1.0
    assert found.precision.tolist() == [1.0, 1.0, 0.5]
    other = checks.detect(own, np.array([0, 1, 0, 0, 1], bool), np.array([2]))
    assert other.auc == pytest.approx(1 / 6)  # of the six pairs (wrong, right), 4 before 3 alone is in order
    assert other.bounds.low <= other.auc <= other.bounds.high


def test_the_area_under_the_curve_is_scikit_learns_ties_included():
    random = np.random.default_rng(5)
    wrong, suspicion = random.random(80) < 0.3, random.integers(0, 9, (4, 80)).astype(float)
    wanted = [roc_auc_score(wrong, row) for row in suspicion]
    np.testing.assert_allclose(checks.auc(suspicion[:, wrong], suspicion[:, ~wrong]), wanted)


def test_self_influence_that_is_the_same_everywhere_finds_nothing():
    wrong = np.arange(20) < 5
    found = checks.detect(np.full(20, -1.0), wrong, np.array([4, 5]))
    assert found.auc == 0.5
    assert found.precision.tolist() == [0.25, 0.25]


def test_the_interval_of_an_auc_covers_what_more_examples_give():
    random = np.random.default_rng(0)
    wrong, covered = np.arange(300) < 60, 0
    exact = 0.7602  # P(a > b) for a ~ N(1, 1), b ~ N(0, 1): Phi(1 / sqrt 2)
    for seed in range(30):
        found = checks.detect(-random.normal(size=300) - wrong, wrong, np.array([5]), seed=seed)
        covered += found.bounds.low <= exact <= found.bounds.high
    assert covered >= 25


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_retrieval_looks_at_the_helpful_end_of_the_ranking(better):
    labels = np.array([0, 0, 1, 1])
    scores = np.array([[-3.0, -2.0, 1.0, 2.0], [3.0, -2.0, -1.0, 2.0]]) * (1 if better == "lower" else -1)
    assert checks.retrieval(scores, np.array([0, 1]), labels, better, k=2).tolist() == [1.0, 0.5]
    assert checks.chance(np.array([0, 1]), labels) == 0.5


def test_agreement_is_spearmans_per_query():
    random = np.random.default_rng(1)
    one, other = random.normal(size=(2, 4, 50))
    wanted = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    np.testing.assert_allclose(checks.agreement(one, other), wanted)


def test_queries_are_split_once_and_for_all():
    chosen = tuning(10, 0.3, 0)
    assert chosen.sum() == 3
    np.testing.assert_array_equal(chosen, tuning(10, 0.3, 0))
    assert any((tuning(10, 0.3, seed) != chosen).any() for seed in (1, 2, 3))
    assert not tuning(1, 0.0, 0).any()


def test_effects_of_single_examples_are_paired_by_seed_and_have_the_sign_of_influence():
    ids = left_out(6, 3, 0)
    subsets = effects.leave_one_out(6, ids)
    assert subsets.shape == (4, 6)
    assert subsets[0].all()
    for row, i in zip(subsets[1:], ids, strict=True):
        assert np.flatnonzero(~row).tolist() == [i]
    value = np.array([1.0, -2.0, 3.0, 0.5, 4.0, -1.0])
    # A measurement that is the sum over those in, plus what the seed does to all subsets alike.
    measured = (subsets @ value)[:, None, None] + np.array([5.0, -7.0])[None, :, None]
    found = effects.effects(measured)
    np.testing.assert_allclose(found[:, :, 0], np.stack([value[ids]] * 2, 1))
    assert lds(value[None], effects.alone(6, ids), found).tolist() == [1.0]
    assert ceiling(found).tolist() == [1.0]


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_what_is_removed_is_most_helpful_and_harm_is_positive_where_it_was(better):
    sign = 1 if better == "lower" else -1
    scores = sign * np.array([0.3, -0.5, 0.1, -0.2])
    first, second = effects.most_helpful(scores, [0.01, 0.5], better)
    assert first.tolist() == [1]
    assert second.tolist() == [1, 3]
    assert effects.harm(np.array([1.0]), np.array([1.0 + sign * 0.7]), better) == pytest.approx([0.7])


def test_removal_at_random_is_nested_and_never_everything():
    small, large = effects.at_random(10, [0.3, 0.99], 0)
    assert set(small) < set(large)
    assert (len(small), len(large)) == (3, 9)
    assert without(10, [small]).sum() == 7


def test_a_list_of_dampings_is_one_method_each():
    swept = expand([{"name": "graddot"}, {"name": "ekfac", "label": "e", "damping": [0.01, "heuristic", 1e-6], "fisher": "exact"}])
    assert [each.family for each in swept] == ["graddot", "e", "e", "e"]
    assert [each.table.get("label") for each in swept] == [None, "e-0.01", "e-heuristic", "e-1e-06"]
    assert [each.table.get("damping") for each in swept] == [None, 0.01, "heuristic", 1e-6]
    assert all(each.table["fisher"] == "exact" for each in swept[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tuning(1, 0.5, 0), r"tuning_queries = 0.5 of 1 queries leaves 0 to tune on and 1 to report"),
        (lambda: tuning(3, 0.9, 0), r"tuning_queries = 0.9 of 3 queries leaves 3 to tune on and 0 to report; give more queries"),
        (lambda: left_out(10, 11, 0), r"leave_one_out = 11 of 10 training examples: it must be from 3 to 10"),
        (lambda: expand([{"name": "ekfac", "damping": []}]), r"damping = \[\] names none"),
        (lambda: expand([{"name": "ekfac", "damping": [1e-3, 0.001]}]), r"names a value twice"),
        (lambda: expand([{"name": "ekfac", "damping": 1.0}, {"name": "ekfac", "damping": [0.1]}]), r"method is labelled 'ekfac', too"),
        (lambda: expand([{"name": "kfac", "label": "ekfac", "damping": [1]}, {"name": "ekfac", "damping": [0.1, 1]}]), r"its own label ="),
    ],
)
def test_what_cannot_be_split_left_out_or_swept_is_refused_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
