"""The linear datamodelling score is right where it can be known, and its interval and ceiling mean what they say."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from tda import InputError
from tda.evaluation.ceiling import ceiling, mean_ceiling
from tda.evaluation.lds import bootstrap, interval, lds, predictions, spearman, truth
from tda.evaluation.subsets import masks, training_seed

# Four examples, subsets {0, 1}, {0, 2}, {1, 2}.
THREE = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]], bool)


def ones(*values):
    """Measurements of one query, a single seed per subset: (subset, 1, 1)."""
    return np.array(values, float)[:, None, None]


@pytest.mark.parametrize(
    ("scores", "measured", "wanted"),
    [
        ([1.0, 2.0, 4.0, 9.0], (3.0, 5.0, 6.0), 1.0),  # sums 3, 5, 6
        ([1.0, 2.0, 4.0, 9.0], (0.1, 0.2, 7.0), 1.0),  # ranks alone count
        ([1.0, 2.0, 4.0, 9.0], (6.0, 5.0, 3.0), -1.0),
        ([1.0, 2.0, 4.0, 9.0], (3.0, 6.0, 5.0), 0.5),  # ranks 1 2 3 against 1 3 2: 1 - 6 * 2 / (3 * 8)
        ([1.0, 2.0, 4.0, 9.0], (5.0, 6.0, 3.0), -0.5),  # against 2 3 1: 1 - 6 * 6 / 24
        ([1.0, 2.0, 2.0, 0.0], (1.0, 2.0, 3.0), np.sqrt(3) / 2),  # sums 3 3 4: a tie shares its mean rank
        ([0.0, 0.0, 0.0, 5.0], (1.0, 2.0, 3.0), 0.0),  # the same sums everywhere: no order is predicted
    ],
)
def test_the_score_of_four_examples_is_the_one_worked_out_by_hand(scores, measured, wanted):
    assert lds(np.array([scores]), THREE, ones(*measured)) == pytest.approx([wanted])


def test_seeds_are_averaged_before_ranking():
    measured = np.array([[0.0, 9.0], [5.0, 5.0], [9.0, 3.0]])[:, :, None]  # means 4.5, 5, 6; each seed alone says otherwise
    assert lds(np.array([[1.0, 2.0, 4.0, 9.0]]), THREE, measured) == pytest.approx([1.0])


def test_every_query_and_method_is_scored_as_it_is_alone():
    random = np.random.default_rng(0)
    influence, measured = random.normal(size=(3, 4, 30)), random.normal(size=(12, 2, 4))
    subsets = masks(30, 0.4, 12, 0)
    found = lds(influence, subsets, measured)
    for m, q in np.ndindex(3, 4):
        predicted = [influence[m, q, subset].sum() for subset in subsets]
        assert found[m, q] == pytest.approx(spearmanr(predicted, measured[:, :, q].mean(1)).statistic)


def test_random_scores_score_nothing_within_the_interval():
    random = np.random.default_rng(1)
    subsets, measured = masks(200, 0.5, 60, 0), random.normal(size=(60, 2, 30))
    influence = random.normal(size=(20, 30, 200))
    draws = bootstrap(influence, subsets, measured, draws=200)
    found = lds(influence, subsets, measured).mean(1)
    bounds = [interval(row, each) for row, each in zip(draws, found, strict=True)]
    assert np.mean([each.low <= 0 <= each.high for each in bounds]) >= 0.8
    assert np.abs(found).max() < 0.1


def test_the_interval_covers_the_score_that_endless_subsets_would_give():
    random = np.random.default_rng(2)
    effect, covered = random.normal(size=(10, 60)), []
    guess = effect + 2 * random.normal(size=effect.shape)

    def score(count, seed):
        subsets = masks(60, 0.5, count, seed)
        return subsets, (effect @ subsets.T).T[:, None] + 0.0

    subsets, measured = score(4000, 0)
    wanted = lds(guess, subsets, measured).mean()
    for seed in range(1, 41):
        subsets, measured = score(50, seed)
        found = interval(bootstrap(guess, subsets, measured, draws=200, seed=seed), lds(guess, subsets, measured).mean())
        covered.append(found.low <= wanted <= found.high)
    assert np.mean(covered) >= 0.85


def test_resamples_are_shared_so_that_methods_can_be_compared():
    random = np.random.default_rng(3)
    subsets, measured = masks(50, 0.5, 20, 0), random.normal(size=(20, 1, 3))
    influence = random.normal(size=(3, 50))
    both = bootstrap(np.stack([influence, 2 * influence]), subsets, measured, draws=50)
    assert both.shape == (2, 50)
    np.testing.assert_array_equal(both[0], both[1])
    np.testing.assert_array_equal(both[0], bootstrap(influence, subsets, measured, draws=50))


@pytest.mark.parametrize("seeds", [4, 5, 16])
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_the_ceiling_is_the_correlation_of_the_mean_with_the_truth(seeds, noise):
    random = np.random.default_rng(4)
    true = random.normal(size=(300, 1, 20))
    measured = true + noise * random.normal(size=(300, seeds, 20))
    wanted = spearman(measured.mean(1).T, true[:, 0].T)
    assert ceiling(measured, splits=20).mean() == pytest.approx(wanted.mean(), abs=0.035)  # Spearman-Brown is exact for Pearson's


@pytest.mark.parametrize("shared", [0.0, 1.0, 5.0])
def test_the_ceiling_of_paired_effects_is_not_lowered_by_what_a_seed_adds_to_all_of_them(shared):
    random = np.random.default_rng(6)
    true = random.normal(size=(300, 1, 20))
    measured = true + random.normal(size=(300, 6, 20)) + shared * random.normal(size=(1, 6, 20))
    wanted = spearman(measured.mean(1).T, true[:, 0].T).mean()
    assert ceiling(measured, splits=20, paired=True).mean() == pytest.approx(wanted, abs=0.035)
    assert shared < 5 or ceiling(measured, splits=20).mean() < wanted - 0.1, "split apart it counts as noise"


def test_the_interval_of_a_correlation_holds_no_number_that_is_none():
    draws = np.random.default_rng(0).normal(0.8, 0.1, 1000)
    assert interval(draws, 0.9).high > 1
    assert interval(draws, 0.9, within=1.0).high == 1.0
    assert interval(-draws, -0.9, within=1.0).low == -1.0
    assert interval(draws, 0.9, within=1.0).low == interval(draws, 0.9).low


@pytest.mark.parametrize("shared", [False, True])
def test_the_mean_ceiling_of_pure_noise_has_0_in_its_interval(shared):
    held, tops = 0, []
    for world in range(20):
        random = np.random.default_rng(world)
        noise = random.normal(size=(40, 6, 30))
        measured = random.normal(size=(40, 6, 1)) + 0.3 * noise if shared else noise  # of one model, what queries measure goes together
        top, bounds = mean_ceiling(measured, splits=20, draws=200)
        held += bounds.low == 0 <= top <= bounds.high
        tops.append(top)
    assert held >= 18, held
    assert np.median(tops) < 0.25
    assert shared or ceiling(measured, splits=20).mean() > 0.15, "of the mean of clipped roots it would not be true"


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_the_mean_ceiling_has_the_correlation_with_the_truth_in_its_interval(noise):
    random = np.random.default_rng(8)
    true = random.normal(size=(100, 1, 20))
    measured = true + noise * random.normal(size=(100, 8, 20))
    wanted = spearman(measured.mean(1).T, true[:, 0].T).mean()
    top, bounds = mean_ceiling(measured, splits=20)
    assert top == pytest.approx(wanted, abs=0.06)
    assert bounds.low < wanted + 0.01
    assert bounds.high > wanted - 0.01
    assert bounds.high - bounds.low < 0.2


def test_a_query_without_any_signal_has_no_ceiling():
    measured = np.random.default_rng(5).normal(size=(500, 4, 50))
    assert ceiling(measured, splits=20).mean() < 0.2


def test_ridge_regressions_exact_influence_predicts_it():
    """It is retrained exactly; its influence functions are first order, with a tenth left out."""
    random = np.random.default_rng(6)
    X, y, Q = random.normal(size=(400, 5)), random.normal(size=400), random.normal(size=(10, 5))
    y += X @ random.normal(size=5)

    def fitted(rows):  # minimises (1/n) sum 0.5 (x w - y)^2 + 0.5 * 0.1 |w|^2
        return np.linalg.solve(X[rows].T @ X[rows] / len(rows) + 0.1 * np.eye(5), X[rows].T @ y[rows] / len(rows))

    w = fitted(np.arange(400))
    gradients = (X @ w - y)[:, None] * X
    influence = -Q @ np.linalg.solve(X.T @ X / 400 + 0.1 * np.eye(5), gradients.T) / 400
    subsets = masks(400, 0.9, 50, 0)
    measured = np.stack([Q @ fitted(np.flatnonzero(subset)) for subset in subsets])[:, None]
    assert lds(influence, subsets, measured).min() > 0.99


def test_subsets_have_their_size_and_more_of_them_keep_the_first():
    few, many = masks(101, 0.3, 5, 7), masks(101, 0.3, 9, 7)
    assert few.dtype == bool
    assert set(many.sum(1)) == {30}
    np.testing.assert_array_equal(few, many[:5])
    assert len(np.unique(many, axis=0)) == 9
    assert (masks(101, 0.3, 5, 8) != few).any()
    assert (masks(101, 0.31, 5, 7)[:, :] != few).any()


def test_examples_are_in_a_subset_equally_often():
    share = masks(50, 0.3, 2000, 0).mean(0)
    assert np.abs(share - 0.3).max() < 5 * np.sqrt(0.21 / 2000)


def test_every_retraining_has_a_seed_of_its_own():
    seeds = {training_seed(0, alpha, subset, repeat) for alpha in (0.3, 0.5) for subset in range(20) for repeat in range(10)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks(10, 0.0, 5, 0), r"alpha must be in \(0, 1\)"),
        (lambda: masks(10, 1.0, 5, 0), r"alpha must be in \(0, 1\)"),
        (lambda: masks(10, float("nan"), 5, 0), r"alpha must be in \(0, 1\)"),
        (lambda: masks(10, 0.01, 5, 0), "alpha = 0.01 of 10 training examples leaves 0 in a subset"),
        (lambda: masks(10, 0.5, 2, 0), "subsets must be at least 3"),
        (lambda: truth(np.zeros((2, 1, 1))), "subsets must be at least 3"),
        (lambda: lds(np.zeros((1, 5)), THREE, ones(1, 2, 3)), "scores of 5 training examples do not fit masks over 4"),
        (lambda: predictions(np.array([[0.0, np.nan, 0.0, 0.0]]), THREE), r"score \(0, 1\) is nan"),
        (lambda: truth(ones(1.0, np.nan, 2.0)), "the measurement of query 0 is nan after retraining on subset 1 with seed 0"),
        (lambda: ceiling(ones(1, 2, 3)), "at least 2 training seeds per subset, got 1"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
