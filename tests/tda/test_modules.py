"""Every parameter is attributed or named with the reason why not; what has no per-example gradient is refused, never wrong in silence."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tda import Categorical, Gaussian, InputError, TokenCategorical
from tda.blocks import example_gradients, to_parameters
from tda.modules import inspect
from tests.tda.pipeline import Given, attribute


def examples(*shape, size=6, classes=3):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(shape, generator=generator), torch.randint(0, classes, (), generator=generator)) for _ in range(size)]


def inspected(model, train=None, likelihood=None, **options):
    torch.manual_seed(0)
    predict, patterns = options.pop("predict", None), options
    train = examples(5) if train is None else train
    return inspect(Given(model.double(), likelihood or Categorical(), train, predict=predict), model, train, **patterns)


def gradients_are_autograds(attributed):
    """Captured gradients of the whole training set against autograd's, by parameter."""
    problem, model = attributed.problem, attributed.model
    train = problem.train
    tape = attributed.tape(attributed.load(train, range(len(train))))
    found = {}
    for block, pairs in zip(attributed.blocks, tape.pairs(tape.seed(problem.likelihood.loss)), strict=True):
        found |= to_parameters(block, example_gradients(block, pairs))
    parameters = dict(model.named_parameters())
    for i in range(len(train)):
        batch = attributed.load(train, [i])
        loss = problem.likelihood.loss(problem.predict(model, batch), batch.targets).sum()
        for name, truth in zip(found, torch.autograd.grad(loss, [parameters[n] for n in found], allow_unused=True), strict=True):
            wanted = torch.zeros_like(parameters[name]) if truth is None else truth.to_dense()
            torch.testing.assert_close(found[name][i], wanted, rtol=1e-10, atol=1e-12)
    return set(found)


class Custom(torch.autograd.Function):
    """x * w, written as users write fused kernels: invisible to anything that watches torch's functions."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return Custom.apply(x, self.weight)


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * torch.stack(tensors=[self.a, self.b]).prod(0)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused, self.out = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.used(x)))


# Coverage: what is left out is named.


def test_unused_frozen_and_excluded_parameters_are_named_with_reasons():
    model = Branch()
    model.used.bias.requires_grad_(False)
    found = inspected(model, exclude=["out"])
    assert {s.name: s.reason for s in found.skipped} == {
        "used.bias": "frozen (requires_grad is False)",
        "unused.weight": "not used in the forward pass",
        "unused.bias": "not used in the forward pass",
        "out.weight": "in `exclude`",
        "out.bias": "in `exclude`",
    }
    assert [b.name for b in found.blocks] == ["used"]
    assert found.share == 20 / (24 + 24 + 15)
    assert sum(s.parameters for s in found.skipped) + 20 == found.total


def test_patterns_choose_modules_and_parameters():
    found = inspected(Branch(), modules=["used", "out.bias"])
    assert [b.parameters for b in found.blocks] == [("used.weight", "used.bias"), ("out.bias",)]
    assert {s.name for s in found.skipped if s.reason == "not in `modules`"} == {"unused.weight", "unused.bias", "out.weight"}
    assert gradients_are_autograds(found) == {"used.weight", "used.bias", "out.bias"}


@pytest.mark.parametrize(
    "kind", [lambda: nn.Linear(5, 3), lambda: nn.Conv1d(2, 3, 2), lambda: nn.LayerNorm(5)], ids=["Linear", "Conv1d", "LayerNorm"]
)
@pytest.mark.parametrize("only", ["weight", "bias"])
def test_a_weight_without_its_bias_and_a_bias_without_its_weight_keep_their_gradients(kind, only):
    whole = nn.Sequential(kind(), nn.Flatten(), nn.LazyLinear(3))
    train = examples(2, 5)
    whole(torch.zeros(1, 2, 5))
    found = inspected(whole, train, modules=[f"0.{only}"])
    assert not found.blocks[0].direct
    assert gradients_are_autograds(found) == {f"0.{only}"}


@pytest.mark.parametrize("options", [{"modules": ["usde"]}, {"exclude": ["usde"]}, {"modules": ["used", "usde.*"]}])
def test_a_pattern_that_matches_nothing_is_refused_with_what_is_near(options):
    with pytest.raises(InputError, match=r"^pattern 'usde.*' matches no module or parameter; .*used"):
        inspected(Branch(), **options)


def test_nothing_left_to_attribute_is_refused():
    with pytest.raises(InputError, match=r"no parameter is left to attribute: .*unused.weight: not used in the forward pass"):
        inspected(Branch(), modules=["unused"])


# Gradients that need care.


def test_an_activation_that_works_in_place_does_not_spoil_the_layer_before_it():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3))
    found = inspected(model)
    assert not any(b.direct for b in found.blocks)
    assert len(gradients_are_autograds(found)) == 4


def test_an_operation_that_we_do_not_know_is_taken_one_example_at_a_time_and_says_so():
    model = nn.Sequential(nn.Bilinear(5, 5, 4), nn.Linear(4, 3))
    found = inspected(model, predict=lambda m, x: m[1](m[0](x, x)))
    assert [(b.name, b.reason) for b in found.blocks if b.direct] == [
        ("0.weight", "one example at a time: used by bilinear"),
        ("0.bias", "one example at a time: used by bilinear"),
    ]
    assert len(gradients_are_autograds(found)) == 4


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Fused(), (5,)),
        (Stacked(), (5,)),
        (nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), (5,)),
        (nn.PReLU(5), (5,)),
        (nn.ConvTranspose1d(2, 3, 2), (2, 4)),
        (nn.Conv3d(1, 2, 2), (1, 2, 3, 3)),
        (nn.InstanceNorm1d(2, affine=True), (2, 4)),
        (nn.GRU(4, 3, batch_first=True), (2, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_no_parameter_with_a_gradient_is_passed_over(layer, shape):
    def predict(m, x):
        y = m[0](x)
        return m[1]((y[0] if isinstance(y, tuple) else y).flatten(1))

    head = nn.LazyLinear(3)
    model = nn.Sequential(layer, head)
    predict(model, torch.zeros(1, *shape))
    found = inspected(model, examples(*shape), predict=predict)
    assert found.share == 1, found.skipped
    assert gradients_are_autograds(found) == {n for n, _ in model.named_parameters()}


def test_positions_added_without_a_batch_axis_are_exact():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position, self.out = nn.Embedding(7, 4), nn.Embedding(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.token(x) + self.position(torch.arange(x.shape[1]))).mean(1))

    train = [(torch.arange(6) % (i + 2), torch.tensor(i % 3)) for i in range(5)]
    assert len(gradients_are_autograds(inspected(Model(), train))) == 4


def test_a_sparse_embedding_is_exact():
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3))
    train = [(torch.arange(6) % (i + 2), torch.tensor(i % 3)) for i in range(5)]
    assert len(gradients_are_autograds(inspected(model, train))) == 3


def test_batches_of_other_lengths_do_not_hide_the_batch_axis():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x, attention_mask):
            weight = attention_mask[..., None].to(x.dtype)
            return self.out((torch.tanh(self.inner(x)) * weight).sum(1) / weight.sum(1))

    class Padded(Given):
        def collate(self, items):
            length = max(len(x) for x, _ in items)
            rows = torch.stack([functional.pad(x, (0, 0, 0, length - len(x))) for x, _ in items])
            mask = torch.stack([torch.arange(length) < len(x) for x, _ in items])
            return {"x": rows, "attention_mask": mask}, torch.stack([y for _, y in items])

    train = [(torch.randn(k, 5, dtype=torch.float64), torch.tensor(k % 3)) for k in (2, 4, 6, 1, 3)]
    model = Model().double()
    problem = Padded(model, Categorical(), train, train[:2])
    found = inspect(problem, model, train)
    assert not any(b.direct for b in found.blocks)
    assert len(gradients_are_autograds(found)) == 4
    methods = [{"name": "ekfac", "fisher": "sampled"}, {"name": "kfac", "fisher": "exact"}]
    one, all_ = (attribute(problem, methods, batch_size=size).influence for size in (1, 5))
    torch.testing.assert_close(one, all_, rtol=1e-11, atol=1e-14)


def test_one_training_example_is_enough():
    assert len(gradients_are_autograds(inspected(nn.Linear(5, 3), examples(5, size=1)))) == 2


# Refusals, in one line.


@pytest.mark.parametrize("features", [(5,), (5, 4)], ids=["(batch, channels)", "(batch, channels, time)"])
def test_batch_statistics_are_refused_by_the_layers_name(features):
    model = nn.Sequential(nn.BatchNorm1d(5, track_running_stats=False), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(2, *features))
    with pytest.raises(InputError, match=r"batch statistics in 0\); use running statistics") as error:
        inspected(model, examples(*features))
    assert "\n" not in str(error.value)


def test_examples_that_see_each_other_are_refused():
    model = nn.Linear(5, 3)
    with pytest.raises(InputError, match="it depends on the other examples"):
        inspected(model, predict=lambda m, x: m(x - x.mean(0)))


class Averaged(Categorical):
    def loss(self, outputs, targets):
        return functional.cross_entropy(outputs, targets)


def test_a_loss_that_is_not_per_example_is_refused():
    with pytest.raises(InputError, match=r"one number per example, shape \(2,\) for a batch of 2, got \(\)") as error:
        inspected(nn.Linear(5, 3), likelihood=Averaged())
    assert "\n" not in str(error.value)


def test_a_measurement_that_is_not_per_query_is_refused():
    class Mean(Given):
        def measurement(self, outputs, targets):
            return outputs.mean()

    model = nn.Linear(5, 3).double()
    with pytest.raises(InputError, match=r"the measurement must be one number per example"):
        inspect(Mean(model, Categorical(), examples(5)), model, examples(5))


def test_a_loss_that_is_not_finite_is_refused_with_its_example():
    with pytest.raises(InputError, match="the loss of train example 0 is nan"):
        inspected(nn.Linear(5, 3), predict=lambda m, x: m(x) * torch.nan)
    train = examples(5)
    train[4] = (train[4][0] * torch.inf, train[4][1])
    model = nn.Linear(5, 3).double()
    with pytest.raises(InputError, match="the loss of train example 4 is nan"):
        attribute(Given(model, Categorical(), train, train[:2]), [{"name": "graddot"}], batch_size=3)
    with pytest.raises(InputError, match="the measurement of query 4 is nan"):
        attribute(Given(model, Categorical(), train[:2], train), [{"name": "graddot"}], batch_size=3)


@pytest.mark.parametrize(
    ("likelihood", "targets", "said"),
    [
        (Categorical(), torch.tensor(3), r"target 3 .*out of range: the model has"),
        (Categorical(), torch.tensor(-1), "target -1 "),
        (Categorical(), torch.tensor(0.5), "targets must be integer class indices, got dtype torch.float64"),
        (Categorical(), torch.tensor([1, 2]), r"outputs \(batch, classes\) and targets \(batch,\)"),
        (Gaussian(), torch.zeros(2), "as many targets as outputs"),
        (Gaussian(), torch.tensor([0.0, torch.nan, 0.0]), "must be finite"),
        (TokenCategorical(), torch.tensor(1), r"outputs \(batch, tokens, vocabulary\)"),
    ],
)
def test_targets_that_do_not_fit_are_refused(likelihood, targets, said):
    with pytest.raises(InputError, match=said) as error:
        inspected(nn.Linear(5, 3), [(torch.zeros(5), targets)] * 3, likelihood)
    assert "\n" not in str(error.value)


def test_a_prediction_that_fails_is_reported_in_one_line():
    with pytest.raises(InputError, match=r"predict\(model, batch\) failed on a batch of 2: RuntimeError") as error:
        inspected(nn.Linear(4, 3))
    assert "\n" not in str(error.value)


def test_a_prediction_that_is_not_a_tensor_is_refused():
    with pytest.raises(InputError, match=r"predict\(model, batch\) must return a tensor .* got dict") as error:
        inspected(nn.Linear(5, 3), predict=lambda m, x: {"logits": m(x)})
    assert "\n" not in str(error.value)
