"""Compiled chains are the same chains: other programs of the same numbers, and where there can be none it is said or done without."""

import pytest
import torch
from torch import nn

import tda
from tda.modules import inspect
from tda.sampling import compiled
from tda.sampling.chains import advance, landscape, start, state_from, state_tensors
from tda.sampling.compiled import apart, worth_compiling
from tda.sampling.options import Sampling
from tda.sampling.recording import even
from tests.tda import language_models as tiny
from tests.tda.sampling.landscapes import Residual, classes, mlp, words
from tests.tda.sampling.test_recording import run

NUMBERS = {"step_size": 1e-4, "n_beta": 100.0, "localization": 30.0, "batch_size": 8, "draws": 3, "thinning": 2, "burn_in": 2, "chains": 3}

needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="needs a C++ compiler")


class Padded(nn.Module):
    """An embedding whose last word is padding, and attention that no later word is seen by."""

    def __init__(self):
        super().__init__()
        self.word, self.joint, self.head = nn.Embedding(11, 8, padding_idx=10), nn.Linear(8, 24), nn.Linear(8, 11)

    def forward(self, ids):
        states = self.word(ids)
        q, k, v = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.joint(states).chunk(3, 2))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(nn.functional.gelu(states + seen.transpose(1, 2).flatten(2)))


def padded(dtype):
    problem, _ = words(dtype)
    torch.manual_seed(0)
    problem.made = Padded().to(dtype)
    problem.measurement = lambda outputs, _: outputs.double().amax(2).sum(1)
    return problem, inspect(problem, problem.made, problem.train_data())


@needs_compiler
def test_compiled_steps_are_those_that_are_not_and_the_same_bits_beside_others_with_more_threads_and_taken_up_again():
    problem, attributed = padded(torch.float64)
    shared, plain = (landscape(attributed, Sampling(**NUMBERS, together=3, compiled=how), problem.train_data()) for how in (True, False))
    assert shared.how == "compiled"
    (whole, losses), (truth, plain_losses) = (advance(each, start(each, range(3)), 8) for each in (shared, plain))
    torch.testing.assert_close(whole.weights, truth.weights, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-12, atol=1e-12)
    assert float((whole.weights - shared.center).norm()) > 0.1
    assert torch.equal(advance(shared, start(shared, [2]), 8)[0].weights[0], whole.weights[2])
    # Nothing of another landscape is used: what a worker makes that takes the chains up.
    fresh = landscape(attributed, shared.sampling, problem.train_data())
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = advance(fresh, state_from(state_tensors(advance(shared, start(shared, range(3)), 3)[0])), 8)[0]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(again.weights, whole.weights)


@needs_compiler
@pytest.mark.soak
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_compiled_evaluations_are_those_that_are_not(dtype, rounding):
    problem, attributed = padded(dtype)
    ways = [Sampling(**NUMBERS, together=3, segment=2, compiled=how) for how in (True, False)]
    found, truth = (run(problem, attributed, way, range(3), tokens=True)[2] for way in ways)
    assert found.keys() == truth.keys()
    for name, value in truth.items():
        assert float(value.abs().max()) > 1e-6, name
        torch.testing.assert_close(found[name], value, rtol=rounding, atol=max(rounding, 1e-6) * float(value.abs().max()), msg=name)


@needs_compiler
@pytest.mark.soak
@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX", "Llama"])
def test_language_models_with_padded_batches_are_compiled(name, tmp_path):
    problem = tiny.causal(tmp_path, name=name)
    attributed = inspect(problem, tiny.drawn(tiny.CAUSAL[name], tiny.CONFIGS[name]).double(), problem.train_data())
    ways = [Sampling(**NUMBERS | {"batch_size": 2}, together=3, compiled=how) for how in (True, False)]
    (shared, state, found), (_, plain, truth) = (run(problem, attributed, way, range(3), tokens=True) for way in ways)
    assert shared.how == "compiled"
    torch.testing.assert_close(state.weights, plain.weights, rtol=1e-6, atol=1e-8)
    # Llama's norms are float32 in any model.
    for which in ("token_loss_train", "loss_query", "distance"):
        torch.testing.assert_close(found[which], truth[which], rtol=1e-4, atol=1e-5)
    assert float(truth["token_loss_train"].abs().max()) > 0.01


class Looks(Residual):
    """What cannot be recorded: it looks at a number."""

    def forward(self, x):
        return super().forward(x) * (1.0 if float(x.sum()) > -1e9 else 2.0)


def test_what_cannot_be_compiled_is_refused_where_it_was_asked_for_and_told_where_it_was_not(monkeypatch):
    problem, attributed = classes(Looks)
    with pytest.raises(
        tda.InputError, match=r'^compiled is true, but the model cannot be compiled: .*; set it to false or "auto"$'
    ) as refused:
        landscape(attributed, Sampling(**NUMBERS, compiled=True), problem.train_data())
    assert "\n" not in str(refused.value)
    monkeypatch.setattr(compiled, "WORTH", 0.0)
    monkeypatch.setattr(compiled, "compiler", lambda: "g++")
    for together in (1, 3):
        shared = landscape(attributed, Sampling(**NUMBERS, together=together, compiled="auto"), problem.train_data())
        assert shared.how.startswith("one by one: ")
        assert "; not compiled: the model cannot be compiled: " in shared.how


def test_without_a_compiler_it_is_said_and_auto_does_without(monkeypatch):
    problem, attributed = classes(Residual)
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    with pytest.raises(tda.InputError, match=r"compiled is true, but no C\+\+ compiler was found"):
        landscape(attributed, Sampling(**NUMBERS, compiled=True), problem.train_data())
    monkeypatch.setattr(compiled, "WORTH", 0.0)
    assert landscape(attributed, Sampling(**NUMBERS, compiled="auto"), problem.train_data()).how == "vmap"


def test_auto_compiles_for_work_of_minutes_alone(monkeypatch):
    monkeypatch.setattr(compiled, "compiler", lambda: "g++")
    targets = torch.zeros(256, 32, dtype=torch.int64)
    data, likelihood = tda.Batch(targets, targets), tda.TokenCategorical()
    few, many = (Sampling(**NUMBERS | {"draws": draws, "thinning": 10, "batch_size": 32}, together=4) for draws in (10, 1000))
    assert not worth_compiling(few, 115_000, data, likelihood)
    assert worth_compiling(many, 115_000, data, likelihood)
    assert not worth_compiling(many, 100, data, likelihood)
    assert not worth_compiling(many, 115_000, tda.Batch(targets, targets[:, 0]), tda.Categorical())


def test_perceptrons_keep_their_products_and_a_program_that_differs_is_not_used():
    problem, attributed = classes(mlp)
    assert landscape(attributed, Sampling(**NUMBERS, compiled=True), problem.train_data()).how == "products"
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001])
    assert not apart([one], [one + 1e-7], torch.float32)
    assert apart([one], [other], torch.float32) == "numbers differ by 5.0e-04 from the model's own"
    assert apart([one], [other[:1]], torch.float32)
    assert apart([one * torch.nan], [one], torch.float32)


def test_attention_over_many_tokens_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(compiled, "SHORT", 6 * 6 - 1)
    problem, attributed = padded(torch.float32)
    with pytest.raises(tda.InputError, match="compiled is true, but attention over so many tokens is faster as it is"):
        landscape(attributed, Sampling(**NUMBERS, compiled=True), problem.train_data())


@pytest.mark.parametrize(("examples", "most", "size"), [(256, 64, 64), (32, 64, 32), (1437, 100, 96), (5, 100, 5), (65, 64, 33)])
def test_evaluations_of_one_size_waste_little(examples, most, size):
    assert even(examples, most) == size
    assert -examples % size < -(-examples // size)
