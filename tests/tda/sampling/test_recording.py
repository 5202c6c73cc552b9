"""What is recorded along chains is the losses of the weights they passed through."""

import pytest
import torch
from torch import nn

import tda
from tda.sampling import recording
from tda.sampling.chains import advance, landscape, start
from tda.sampling.losses import example_losses, token_losses
from tda.sampling.options import Sampling
from tda.sampling.recording import Recorder
from tests.tda.sampling.landscapes import Residual, classes, mlp, words

NUMBERS = {"step_size": 1e-4, "n_beta": 100.0, "localization": 30.0, "batch_size": 16}
OPTIONS = {"burn_in": 5, "draws": 9, "thinning": 2, "segment": 4, "chains": 3, "together": 3}


def run(problem, attributed, sampling, chains, **more):
    """All pieces of some chains, put together."""
    shared = landscape(attributed, sampling, problem.train_data())
    recorder = Recorder(attributed, shared, problem.train_data(), problem.query_data(), **more)
    state, parts = start(shared, chains), []
    for piece in sampling.pieces:
        state, recorded = recorder.record(state, piece)
        parts.append(recorded)
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return shared, state, {name: torch.cat([getattr(part, name) for part in parts], 1) for name in names}


def directly(problem, shared, row, data, function):
    """A function of outputs and targets under the weights of one row, less the same at the checkpoint, in float64."""
    values = []
    for weights in (row, shared.center):
        model = problem.model()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(before | {name: value.to(model.state_dict()[name]) for name, value in shared.ensemble.named(weights).items()})
        batch = tda.Batch(*map(torch.stack, zip(*data, strict=True)))
        with torch.no_grad():
            double = [leaf.double() if leaf.is_floating_point() else leaf for leaf in batch]
            values.append(function(problem.predict(model.double(), tda.Batch(*double)), double[1]))
        model.to(row.dtype).load_state_dict(before)
    return values[0] - values[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [mlp, Residual])
def test_losses_and_measurements_are_those_of_the_weights_at_each_draw(make, dtype):
    problem, attributed = classes(make, dtype)
    problem.measurement = tda.margin
    sampling = Sampling(**NUMBERS, **OPTIONS)
    shared, _, found = run(problem, attributed, sampling, range(3))
    draws = []
    advance(shared, start(shared, range(3)), sampling.steps, lambda draw, weights: draws.append((draw, weights.clone())))
    assert [draw for draw, _ in draws] == list(range(9))
    loss = problem.likelihood.loss
    for draw, weights in draws:
        for c in range(3):
            train = directly(problem, shared, weights[c], problem.train_data(), loss)
            assert float((found["loss_train"][c, draw] - train).abs().max()) < 1e-6
            query = directly(problem, shared, weights[c], problem.query_data(), loss)
            assert float((found["loss_query"][c, draw] - query).abs().max()) < 1e-6
            margin = directly(problem, shared, weights[c], problem.query_data(), tda.margin)
            assert float((found["measurement_query"][c, draw] - margin).abs().max()) < 3e-6
            assert abs(float(found["distance"][c, draw] - (weights[c] - shared.center).norm())) < 1e-5
    assert float(found["loss_train"].abs().max()) > 1e-2
    assert found["loss_train"].dtype == torch.float32


@pytest.mark.parametrize("make", [mlp, Residual])
def test_a_chain_cut_in_other_segments_or_evaluated_in_other_batches_has_the_same_losses(make, monkeypatch):
    problem, attributed = classes(make)
    whole = run(problem, attributed, Sampling(**NUMBERS, **OPTIONS | {"segment": 100}), range(3))[2]
    monkeypatch.setattr(recording, "CACHED", 50)
    monkeypatch.setattr(recording, "ALONE", 60)
    monkeypatch.setattr(recording, "DRAWS", 2)
    pieces = run(problem, attributed, Sampling(**NUMBERS, **OPTIONS), range(3))[2]
    assert torch.equal(whole["batch_loss"], pieces["batch_loss"])
    for name, value in whole.items():
        assert value.shape == pieces[name].shape
        assert float((value - pieces[name]).abs().max()) < 2e-6


def test_evaluation_stays_within_its_memory_whatever_the_number_of_examples(monkeypatch):
    problem, attributed = classes(mlp, examples=500)
    sampling = Sampling(**NUMBERS, **OPTIONS)
    shared = landscape(attributed, sampling, problem.train_data())
    recorder = Recorder(attributed, shared, problem.train_data(), problem.query_data())
    assert recorder.width == 8
    largest, original = [], type(shared.ensemble).outputs

    def outputs(self, weights, batch):
        largest.append(len(weights) * len(batch.targets) * 8)
        return original(self, weights, batch)

    monkeypatch.setattr(type(shared.ensemble), "outputs", outputs)
    monkeypatch.setattr(recording, "CACHED", 2000)
    recorder.record(start(shared, range(3)), sampling.pieces[0])
    recorder.record(advance(shared, start(shared, range(3)), 5)[0], sampling.pieces[1])
    assert 0 < max(largest) <= 2000


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("together", [1, 3])
def test_token_losses_sum_to_the_losses_of_their_sequences(reduction, together):
    problem, attributed = words(reduction=reduction)
    sampling = Sampling(**NUMBERS, **OPTIONS | {"together": together})
    found = run(problem, attributed, sampling, range(together), tokens=True)[2]
    plain = run(problem, attributed, sampling, range(together))[2]
    for split in ("train", "query"):
        tokens = found[f"token_loss_{split}"]
        assert tokens.shape == (*found[f"loss_{split}"].shape, 6)
        assert float((tokens.sum(3) - found[f"loss_{split}"]).abs().max()) < 1e-6
        assert float((plain[f"loss_{split}"] - found[f"loss_{split}"]).abs().max()) < 1e-6
    assert bool((found["token_loss_train"][:, :, 1::3, -2:] == 0).all())
    assert float(found["token_loss_train"].abs().max()) > 1e-3


def test_tokens_of_a_likelihood_without_tokens_are_refused():
    problem, attributed = classes(mlp)
    shared = landscape(attributed, Sampling(**NUMBERS), problem.train_data())
    with pytest.raises(tda.InputError, match="TokenCategorical, got Categorical; set tokens = false"):
        Recorder(attributed, shared, problem.train_data(), problem.query_data(), tokens=True)


def test_losses_from_float32_outputs_are_exact_for_those_outputs():
    """Well-learnt examples too: an absolute error of a float32 softmax would be all of their loss."""
    torch.manual_seed(0)
    outputs, targets = 6 * torch.randn(3, 200, 10), torch.randint(10, (200,))
    outputs[:, range(200), targets] += 15
    truth = torch.stack([torch.nn.functional.cross_entropy(each.double(), targets, reduction="none") for each in outputs])
    found = example_losses(tda.Categorical(), outputs, targets)
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-15)
    ids = targets.view(20, 10)
    tokens = token_losses(tda.TokenCategorical(), outputs.view(3, 20, 10, 10), ids)
    torch.testing.assert_close(tokens.view(3, 200), truth, rtol=2e-6, atol=1e-15)
    spread = outputs[:, :, 0] * 0 + torch.linspace(-300, 300, 200)  # far apart: nothing underflows, nothing overflows
    apart = torch.stack([spread, 0 * spread], -1)
    wanted = torch.nn.functional.softplus(-spread.double(), threshold=1e9)
    found = token_losses(tda.TokenCategorical(), apart[:, None], torch.zeros(1, 200, dtype=torch.int64))
    torch.testing.assert_close(found.view(3, 200)[:, :114], wanted[:, :114], rtol=2e-6, atol=1e-15)


class Overflows(nn.Sequential):
    """Outputs that leave what numbers can hold once the first weight has moved far enough."""

    def forward(self, x):
        found = super().forward(x)
        return found + torch.where((self[0].weight[0, 0] > self.limit) & (x[:, :1] == x.new_tensor(7.0)), torch.inf, 0.0)


@pytest.mark.parametrize("together", [1, 3])
def test_a_loss_that_is_not_finite_at_a_draw_ends_that_chain_there_and_is_nan_from_then_on(together):
    def make():
        made = Overflows(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        made.limit = torch.inf
        return made

    problem, _ = classes(make)
    problem.inputs = problem.inputs.clone()
    problem.inputs[2, 0] = 7.0
    problem.model().limit = float(problem.model()[0].weight[0, 0].detach()) + 0.01
    attributed = tda.modules.inspect(problem, problem.model(), problem.train_data())
    problem.query_data = lambda: torch.utils.data.TensorDataset(problem.inputs[3:5], problem.targets[3:5])
    sampling = Sampling(**NUMBERS | {"batch_size": "full"}, **OPTIONS | {"together": together, "draws": 40, "segment": 40})
    chains = range(together)
    _, state, found = run(problem, attributed, sampling, chains)
    assert state.lost
    for c, chain in enumerate(chains):
        good = found["loss_train"][c].isfinite().all(1)
        if chain not in state.lost:
            assert bool(good.all())
            continue
        count = int(good.sum())
        assert count < 40
        for name in ("loss_train", "loss_query", "measurement_query", "distance"):
            assert bool(found[name][c, :count].isfinite().all())
            assert bool(found[name][c, count:].isnan().all())
        assert f"chain {chain} was stopped at step" in state.lost[chain]


def readout(self, outputs, targets):
    """A measurement that holds numbers of the model's dtype, as a user's may."""
    del self, targets
    return outputs @ torch.linspace(-1, 1, outputs.shape[-1], dtype=torch.float32)


@pytest.mark.parametrize("make", [mlp, Residual])
def test_a_user_s_measurement_is_given_outputs_in_the_model_s_dtype(make):
    problem, attributed = classes(make, torch.float32)
    problem.__class__ = type("Measured", (type(problem),), {"measurement": readout})
    _, _, found = run(problem, attributed, Sampling(**NUMBERS, **OPTIONS), range(3))
    assert found["measurement_query"].abs().max() > 0
