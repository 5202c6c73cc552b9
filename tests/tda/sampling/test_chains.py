"""A chain is a function of its options, seed and number: not of its neighbours, of where it was cut, nor of the way it is computed."""

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tda
from tda.modules import inspect
from tda.sampling import ensembles
from tda.sampling.batches import Batches, Noise
from tda.sampling.chains import advance, landscape, start, state_from, state_tensors
from tda.sampling.ensembles import OneByOne, Stacked
from tda.sampling.options import Sampling
from tda.sampling.perceptrons import Perceptrons
from tests.tda.sampling.landscapes import Given, Residual, classes, mlp, words

NUMBERS = {"step_size": 1e-4, "n_beta": 100.0, "localization": 30.0, "batch_size": 16}


def hooked():
    """A model that torch cannot batch: it looks at a number."""

    class Looks(Residual):
        def forward(self, x):
            return super().forward(x) * (1.0 if float(x.sum()) > -1e9 else 2.0)

    return Looks()


KINDS = {"products": lambda dtype: classes(mlp, dtype), "vmap": lambda dtype: classes(Residual, dtype), "one": lambda dtype: classes(hooked, dtype)}  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_a_path_agrees_to_rounding_alone_or_beside_others(kind, sampler, dtype, tolerance):
    problem, attributed = KINDS[kind](dtype)
    together, alone = (
        landscape(attributed, Sampling(**NUMBERS, sampler=sampler, chains=5, together=k), problem.train_data()) for k in (5, 1)
    )
    assert together.how.startswith({"products": "products", "vmap": "vmap", "one": "one by one: torch cannot batch the model"}[kind])
    assert alone.how.startswith("products" if kind == "products" else "one by one")
    beside = advance(together, start(together, range(5)), 100)[0].weights
    for chain in (0, 3):
        weights = advance(alone, start(alone, [chain]), 100)[0].weights[0]
        moved = float((weights - alone.center).norm())
        assert float((weights - beside[chain]).norm() / weights.norm()) < tolerance
        assert moved / float(weights.norm()) > 0.01
    assert float((beside[0] - beside[3]).norm() / beside[0].norm()) > 0.01


def test_noise_and_batches_are_identical_alone_or_beside_others_and_from_any_step():
    like = torch.zeros(1234)
    beside, alone = Noise(5, [0, 4, 2], like), Noise(5, [2], like)
    for step in (0, 1, 100, 3, 999, 26):
        assert torch.equal(beside.at(step)[2], alone.at(step)[0])
    data = tda.Batch(torch.arange(50)[:, None], torch.arange(50))
    sampling = Sampling(**NUMBERS, seed=9)
    many, one = Batches(sampling, [0, 4, 2], data), Batches(sampling, [2], data)
    assert torch.equal(many.ids(0, 10)[3:, 2], one.ids(3, 10)[:, 0])
    given = [batch.targets[2] for batch in many.steps(0, 10)]
    assert all(torch.equal(a, b) for a, b in zip(given, one.ids(0, 10)[:, 0], strict=True))
    other = Batches(Sampling(**NUMBERS, seed=10), [2], data)
    assert not torch.equal(other.ids(0, 10), one.ids(0, 10))
    assert not torch.equal(Noise(6, [2], like).at(0), alone.at(0))


def test_noise_is_standard_normal_and_chains_are_not_correlated():
    drawn = torch.stack([Noise(0, range(4), torch.zeros(5000)).at(step) for step in (0, 7)]).flatten(0, 1).double()
    assert float((drawn @ drawn.T / 5000 - torch.eye(8)).abs().max()) < 0.08
    assert abs(float((drawn**4).mean()) - 3) < 0.15


def test_an_epoch_uses_no_example_twice_and_drops_what_does_not_fill_a_batch():
    data = tda.Batch(torch.arange(50)[:, None], torch.arange(50))
    ids = Batches(Sampling(**NUMBERS), [1], data).ids(0, 9)[:, 0]
    epochs = ids.view(3, 48)
    assert all(len(set(epoch.tolist())) == 48 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_a_chain_that_is_stored_and_taken_up_again_is_bit_for_bit_the_same(kind, sampler):
    problem, attributed = KINDS[kind](torch.float32)
    shared = landscape(attributed, Sampling(**NUMBERS, sampler=sampler, chains=3, together=3), problem.train_data())
    whole, losses = advance(shared, start(shared, range(3)), 57)
    state, parts = start(shared, range(3)), []
    for until in (1, 20, 38, 57):
        given = state.weights.clone()
        after, part = advance(shared, state, until)
        assert torch.equal(state.weights, given)
        fresh = landscape(attributed, shared.sampling, problem.train_data())
        state = state_from(load(save(state_tensors(after))))
        shared = fresh
        parts.append(part)
    assert state.step == whole.step == 57
    assert torch.equal(state.weights, whole.weights)
    assert torch.equal(torch.cat(parts, 1), losses)
    if sampler == "rmsprop":
        assert torch.equal(state.square, whole.square)


def test_a_stored_state_holds_its_lost_chains_with_their_sentences():
    problem, attributed = classes(mlp)
    shared = landscape(attributed, Sampling(**NUMBERS), problem.train_data())
    state = start(shared, [4, 7])
    state.lost[7] = 'chain 7: "nan" \u2014 lower step_size'
    again = state_from(load(save(state_tensors(state))))
    assert (again.chains, again.step, again.lost) == ((4, 7), 0, state.lost)


@pytest.mark.parametrize("make", [mlp, Residual])
@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_every_way_of_computing_gives_the_same_gradients_losses_and_outputs(make, likelihood):
    torch.manual_seed(0)
    inputs, model = torch.randn(30, 6, dtype=torch.float64), make().double()
    targets = {
        "categorical": torch.randint(3, (30,)),
        "bernoulli": torch.rand(30, 3, dtype=torch.float64).round(),
        "gaussian": torch.randn(30, 3, dtype=torch.float64),
    }[likelihood]
    chosen = {"categorical": tda.Categorical(), "bernoulli": tda.Bernoulli(), "gaussian": tda.Gaussian()}[likelihood]
    problem = Given(model, inputs, targets, chosen)
    attributed = inspect(problem, model, problem.train_data())
    data, found = tda.Batch(inputs, targets), []
    ways = [Stacked(attributed), OneByOne(attributed, "")] + ([Perceptrons(attributed, data)] if make is mlp else [])
    for way in ways:
        prepared = way.prepare(data)
        batch = tda.Batch(prepared.inputs.view(3, 10, -1), targets.view(3, 10, *targets.shape[1:]))
        weights = torch.stack([way.center() * factor for factor in (1.0, 0.9, 1.1)])
        into, losses = torch.empty_like(weights), torch.empty(3, dtype=torch.float64)
        way.gradient(weights, into)(batch, losses)
        found.append(({name: value.clone() for name, value in way.named(into).items()}, losses, way.outputs(weights, prepared)))
    for gradients, losses, outputs in found[1:]:
        assert gradients.keys() == found[0][0].keys() == dict(model.named_parameters()).keys()
        for name, value in gradients.items():
            torch.testing.assert_close(value, found[0][0][name], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(losses, found[0][1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(outputs, found[0][2], rtol=1e-10, atol=1e-12)
    assert all(float(value.abs().max()) > 1e-6 for value in found[0][0].values())


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("make", [mlp, Residual])
def test_what_is_not_attributed_stays_and_the_model_itself_is_not_touched(make, together):
    problem, _ = classes(make)
    model = problem.model()
    left_out = next(iter(dict(model.named_children())))
    attributed = inspect(problem, model, problem.train_data(), exclude=[left_out])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shared = landscape(attributed, Sampling(**NUMBERS, chains=3, together=together), problem.train_data())
    state, _ = advance(shared, start(shared, range(together)), 5)
    named = shared.ensemble.named(state.weights)
    assert named.keys() == {name for name, _ in model.named_parameters() if not name.startswith(left_out + ".")}
    assert all(float((value - before[name]).abs().max()) > 0 for name, value in named.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_language_model_advances_by_vmap_as_one_by_one():
    problem, attributed = words(torch.float64)
    numbers = NUMBERS | {"batch_size": 8}
    for sampler in ("sgld", "rmsprop"):
        shared, alone = (landscape(attributed, Sampling(**numbers, sampler=sampler, together=k), problem.train_data()) for k in (3, 1))
        assert (shared.how, alone.how) == ("vmap", "one by one: a chain on its own")
        beside = advance(shared, start(shared, range(3)), 30)[0].weights
        assert torch.allclose(beside[1], advance(alone, start(alone, [1]), 30)[0].weights[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_that_diverges_is_stopped_and_named_and_never_reaches_the_others(kind, bad):
    problem, attributed = KINDS[kind](torch.float32)
    shared = landscape(attributed, Sampling(**NUMBERS, chains=3, together=3), problem.train_data())
    good, quiet = advance(shared, start(shared, range(3)), 40)
    state = advance(shared, start(shared, range(3)), 20)[0]
    state.weights[1, 5] = bad  # what a step too large ends in
    after, losses = advance(shared, state, 40)
    assert list(after.lost) == [1]
    # A saturated tanh hides an infinite weight from the loss: then it is found at the end.
    first = {"chain 1 was stopped at step 20: the batch's loss is nan", "chain 1 was stopped at step 40: a weight is not finite"}
    assert after.lost[1].removesuffix("; lower step_size (now 0.0001)") in (first if bad == torch.inf else {min(first)})
    assert bool(after.weights[1].isnan().all())
    assert torch.equal(after.weights[[0, 2]], good.weights[[0, 2]])
    assert torch.equal(losses[[0, 2]], quiet[[0, 2], 20:])
    again, more = advance(shared, after, 50)
    assert again.lost == after.lost
    assert bool(more[1].isnan().all())
    assert bool(more[[0, 2]].isfinite().all())


def test_a_step_size_far_too_large_loses_every_chain_and_says_at_which_step():
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 1)), torch.randn(20, 3)
    problem = Given(model, inputs, torch.randn(20, 1), tda.Gaussian())
    attributed = inspect(problem, model, problem.train_data())
    sampling = Sampling(step_size=10.0, n_beta=1e3, localization=1.0, batch_size="full", chains=2, together=2)
    shared = landscape(attributed, sampling, problem.train_data())
    state, losses = advance(shared, start(shared, range(2)), 60)
    for chain in range(2):
        finite = int(losses[chain].isfinite().sum())
        assert 2 < finite < 20
        assert f"chain {chain} was stopped at step {finite}: the batch's loss is" in state.lost[chain]
        assert bool(losses[chain, finite:].isnan().all())
    after, nothing = advance(shared, state, 70)
    assert bool(nothing.isnan().all())
    assert after.step == 70


class Waits(TorchDispatchMode):
    """Counts the operations whose result Python waits for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("make", [mlp, Residual])
def test_steps_wait_for_no_number(make, together, sampler):
    problem, attributed = classes(make)
    shared = landscape(attributed, Sampling(**NUMBERS, sampler=sampler, together=together), problem.train_data())
    counts = []
    for steps in (10, 60):
        with Waits() as waits:
            advance(shared, start(shared, range(together)), steps, lambda _, weights: weights.clone())
        counts.append(waits.count)
    assert counts[0] == counts[1]
    with Waits() as waits:
        float(torch.ones(2).sum())
    assert waits.count == 1


def test_a_model_that_fills_a_device_advances_one_chain_at_a_time(monkeypatch):
    problem, attributed = classes(Residual)
    monkeypatch.setattr(ensembles, "STACKED", 50)
    shared = landscape(attributed, Sampling(**NUMBERS), problem.train_data())
    assert shared.how == "one by one: 76 parameters are enough to fill a device"


def test_batch_norm_without_running_statistics_is_refused():
    problem, attributed = classes(mlp)
    made = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))
    attributed = attributed.__class__(problem, made, attributed.blocks, {}, (), 1, torch.float32)
    with pytest.raises(tda.InputError, match=r"^1 \(BatchNorm1d\) lacks running statistics.*use LayerNorm or GroupNorm$"):
        landscape(attributed, Sampling(**NUMBERS), problem.train_data())


def test_batch_norm_with_running_statistics_is_sampled_in_eval_mode():
    problem, attributed = classes(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))
    before = {name: value.clone() for name, value in problem.model().named_buffers()}
    for together in (1, 3):
        shared = landscape(attributed, Sampling(**NUMBERS, together=together), problem.train_data())
        state, _ = advance(shared, start(shared, range(together)), 5)
        assert not state.lost
    assert all(torch.equal(value, before[name]) for name, value in problem.model().named_buffers())


class NeedsTraining(nn.Linear):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("the loss is made in train mode only\nand more")
        return super().forward(x)


class Random(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


@pytest.mark.parametrize(
    ("module", "said"),
    [(NeedsTraining, "failed in eval mode, in which chains run: RuntimeError: the loss is made"), (Random, "is random in")],
)
def test_a_loss_that_needs_train_mode_or_is_random_is_refused_in_one_line(module, said):
    problem, attributed = classes(mlp)
    attributed = attributed.__class__(problem, module(6, 3), attributed.blocks, {}, (), 1, torch.float32)
    with pytest.raises(tda.InputError, match=said) as refused:
        landscape(attributed, Sampling(**NUMBERS), problem.train_data())
    assert "\n" not in str(refused.value)


def test_a_loss_that_is_not_finite_at_the_checkpoint_is_refused_by_its_example():
    problem, attributed = classes(mlp)
    problem.inputs[3] = torch.inf
    with pytest.raises(tda.InputError, match="the loss of train example 3 is nan at the checkpoint"):
        landscape(attributed, Sampling(**NUMBERS), problem.train_data())
