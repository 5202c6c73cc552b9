"""Losses are negative log-likelihoods, samples follow the model, and the Hessian's columns are the expectation over labels."""

import itertools
import math

import pytest
import torch
from torch.distributions import Bernoulli as CoinFlips
from torch.distributions import Categorical as Classes
from torch.distributions import Normal

import tda
from tda import Bernoulli, Categorical, Gaussian, InputError, TokenCategorical
from tda.curvature.labels import uniforms


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(likelihood, outputs, targets):
    outputs = outputs.clone().requires_grad_()
    return torch.autograd.grad(likelihood.loss(outputs, targets).sum(), outputs)[0]


def hessian(likelihood, outputs, targets):
    columns = torch.stack([c.reshape(len(c), -1) for c in likelihood.hessian_columns(outputs, targets)])
    return torch.einsum("kbi,kbj->bij", columns, columns)


def test_losses_are_negative_log_likelihoods():
    logits, labels = drawn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(Categorical().loss(logits, labels), -Classes(logits=logits).log_prob(labels))
    answers = torch.tensor([[0.0, 1], [1, 1], [0, 0]]).double()
    torch.testing.assert_close(Bernoulli().loss(drawn(3, 2), answers), -CoinFlips(logits=drawn(3, 2)).log_prob(answers).sum(1))
    outputs, targets = drawn(4, 2), drawn(4, 2, seed=1)
    constant = math.log(2 * math.pi)  # 0.5 log(2 pi) for each of two outputs, which the loss leaves out
    torch.testing.assert_close(Gaussian().loss(outputs, targets), -Normal(outputs, 1.0).log_prob(targets).sum(1) - constant)


def test_the_loss_of_tokens_is_the_sum_or_the_mean_over_labelled_ones():
    logits, labels = drawn(3, 4, 5), torch.tensor([[1, 2, -100, 4], [0, -100, -100, -100], [-100] * 4])
    each = -Classes(logits=logits).log_prob(labels.clamp(min=0)) * (labels != -100)
    torch.testing.assert_close(TokenCategorical().loss(logits, labels), each.sum(1))
    torch.testing.assert_close(TokenCategorical(reduction="mean").loss(logits, labels), each.sum(1) / torch.tensor([3, 1, 1]))
    other = torch.where(labels == -100, 0, labels)
    assert TokenCategorical(ignore_index=0).loss(logits, other)[2] == 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_sampled_fisher_of_tokens_is_the_hessian_of_their_loss(reduction):
    """Over all labels that may be drawn, weighted by their probability, also where an example has fewer labelled tokens."""
    likelihood, outputs = TokenCategorical(reduction=reduction), drawn(2, 3, 4)
    targets = torch.tensor([[1, 2, 0], [3, -100, 1]])
    fisher = torch.zeros(2, 12, 12).double()
    for labels in itertools.product(range(4), repeat=3):
        chosen = torch.where(targets == -100, -100, torch.tensor(labels))
        # A place that is not labelled is counted once for each word it might have had.
        ways = 4.0 ** (targets == -100).sum(1)
        chance = torch.exp(-TokenCategorical().loss(outputs, chosen)) / ways
        at = outputs.clone().requires_grad_()
        g = torch.autograd.grad(likelihood.sampled_loss(at, chosen).sum(), at)[0].flatten(1)
        fisher += chance[:, None, None] * g[:, :, None] * g[:, None, :]
    units = torch.eye(12).double().view(12, 1, 3, 4).expand(12, 2, 3, 4)
    hessian = likelihood.hessian_product(outputs, targets, units).flatten(2).permute(1, 0, 2)
    torch.testing.assert_close(fisher, hessian)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_trailing_axis_of_one_may_lack_in_outputs_or_targets(shape):
    for likelihood, targets in ((Gaussian(), drawn(4)), (Bernoulli(), torch.tensor([0, 1, 1, 0]))):
        for outputs, given in itertools.product((drawn(4), drawn(4, 1)), (targets, targets[:, None])):
            likelihood.check(outputs, given)
            torch.testing.assert_close(likelihood.loss(outputs, given), likelihood.loss(drawn(4), targets))
            assert likelihood.sample(outputs, given, uniforms(0, range(4), likelihood.draws(outputs))).shape == outputs.shape


@pytest.mark.parametrize("outputs", [drawn(4, 3), torch.tensor([[0.0, 0, 0], [30, 0, -30], [-800, 0, 800], [5, 5, -5]]).double()])
def test_categorical_columns_are_the_expectation_over_classes(outputs):
    p, wanted = outputs.softmax(1), torch.zeros(len(outputs), 3, 3, dtype=torch.float64)
    for c in range(3):
        g = gradient(Categorical(), outputs, torch.full((len(outputs),), c))
        wanted += p[:, c, None, None] * g[:, :, None] * g[:, None, :]
    torch.testing.assert_close(hessian(Categorical(), outputs, None), wanted, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(wanted, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("likelihood", "shape"), [(Gaussian(), (3, 2)), (Gaussian(), (3,)), (Bernoulli(), (3, 2)), (Bernoulli(), (3,))])
def test_columns_are_the_hessian_with_respect_to_the_outputs(likelihood, shape):
    outputs, targets = drawn(*shape), torch.zeros(shape, dtype=torch.float64)
    for b, found in enumerate(hessian(likelihood, outputs, targets)):
        truth = torch.autograd.functional.hessian(lambda o, b=b: likelihood.loss(o[None], targets[b : b + 1])[0], outputs[b])
        torch.testing.assert_close(found, truth.reshape(found.shape))


@pytest.mark.parametrize("likelihood", [Categorical(), TokenCategorical()])
def test_drawn_classes_are_as_frequent_as_the_model_says(likelihood):
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).double()
    outputs = logits.expand(20_000, 4) if isinstance(likelihood, Categorical) else logits.expand(10_000, 2, 4)
    targets = torch.zeros(outputs.shape[:-1], dtype=torch.int64)
    labels = likelihood.sample(outputs, targets, uniforms(0, range(len(outputs)), likelihood.draws(outputs)))
    assert labels.shape == targets.shape
    assert labels.dtype == torch.int64
    torch.testing.assert_close(labels.flatten().bincount(minlength=4) / 20_000, logits.softmax(0).float(), rtol=0, atol=0.01)


def test_drawn_numbers_and_answers_have_the_models_moments():
    outputs = torch.tensor([[3.0, -1.0]]).double().expand(20_000, 2)
    u = uniforms(0, range(20_000), 2)
    numbers, answers = Gaussian().sample(outputs, outputs, u), Bernoulli().sample(outputs, outputs, u)
    torch.testing.assert_close(numbers.mean(0), outputs[0], rtol=0, atol=0.03)
    torch.testing.assert_close(numbers.var(0), torch.ones(2).double(), rtol=0, atol=0.03)
    assert set(answers.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(answers.mean(0), outputs[0].sigmoid(), rtol=0, atol=0.02)


def test_extreme_numbers_draw_possible_labels():
    ends = torch.tensor([[2.0**-60], [0.5], [1 - 2.0**-53]], dtype=torch.float64)
    certain = torch.tensor([-1e4, 0.0, -1e4]).double().expand(3, 3)
    assert Categorical().sample(certain, None, ends).tolist() == [1, 1, 1]
    assert bool(torch.isfinite(Gaussian().sample(torch.zeros(3, 1).double(), None, ends)).all())


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "said"),
    [
        (Categorical(), drawn(2, 3), torch.tensor([0, 3]), "target 3 at place 1"),
        (Categorical(), drawn(2, 3), torch.tensor([-100, 1]), "target -100 at place 0"),
        (Categorical(), drawn(2, 3), torch.tensor([0.0, 1.0]), "integer class indices"),
        (Categorical(), drawn(2, 3), torch.tensor([True, False]), "integer class indices"),
        (Categorical(), drawn(2, 3, 4), torch.tensor([[0, 1, 2]] * 2), "TokenCategorical"),
        (Categorical(), drawn(2, 3), torch.tensor([0]), "targets"),
        (TokenCategorical(), drawn(2, 3, 4), torch.tensor([[0, 1, 2], [3, 4, -100]]), "target 4 at place 1"),
        (TokenCategorical(), drawn(2, 3), torch.tensor([0, 1]), "vocabulary"),
        (Gaussian(), drawn(2, 3), drawn(2, 2), "as many targets as outputs"),
        (Gaussian(), drawn(2, 3), drawn(3, 2), "as many targets as outputs"),
        (Gaussian(), drawn(2, 1), torch.tensor([0.0, torch.inf]), "finite"),
        (Bernoulli(), drawn(2, 1), torch.tensor([0, 2]), r"\[0, 1\], got 2"),
        (Bernoulli(), drawn(2, 1), torch.tensor([-0.5, 1]), r"\[0, 1\], got -0.5"),
    ],
)
def test_targets_that_cannot_belong_to_the_outputs_are_refused_in_one_line(likelihood, outputs, targets, said):
    with pytest.raises(InputError, match=said) as error:
        likelihood.check(outputs, targets)
    assert "\n" not in str(error.value)


def test_labels_too_many_to_enumerate_are_refused_with_the_way_out():
    with pytest.raises(InputError, match=r'cannot enumerate .*use fisher = "sampled" or "empirical"'):
        next(Categorical(max_columns=2).hessian_columns(drawn(2, 3), None))
    with pytest.raises(InputError, match="3 tokens x 4 words"):
        TokenCategorical().hessian_columns(drawn(2, 3, 4), None)


def test_the_margin_is_the_log_odds_of_the_right_class():
    logits, labels = drawn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    p = logits.softmax(1)[torch.arange(5), labels]
    torch.testing.assert_close(tda.margin(logits, labels), torch.log(p / (1 - p)))


def test_the_absolute_error_is_summed_over_outputs():
    torch.testing.assert_close(tda.absolute_error(drawn(4, 2), drawn(4, 2, seed=1)), (drawn(4, 2) - drawn(4, 2, seed=1)).abs().sum(1))
    torch.testing.assert_close(tda.absolute_error(drawn(4, 1), drawn(4)), torch.zeros(4).double())
