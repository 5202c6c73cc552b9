"""Nothing that is computed on a device is left behind on another, and the numbers are the processor's."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import tda
from tda.data import load_batch
from tda.device import CPU, device_here, home, named, placed, ready
from tda.directions import Dense
from tda.evaluation.retraining import retrained
from tda.modules import inspect
from tda.problem import training_device
from tda.sampling.batches import DRAWN_HERE, Noise
from tda.sampling.chains import advance, landscape, start
from tda.sampling.options import Sampling
from tests.devices import DEVICES, TOLERANCES, apart, working_on
from tests.elsewhere import PAPER, Elsewhere
from tests.tda.layers import LAYERS
from tests.tda.pipeline import Given, attribute
from tests.tda.reference import problem_of
from tests.tda.sampling.landscapes import Residual, classes, mlp
from tests.tda.systems import SHORT, SOLVERS, Setting

METHODS = [{"name": "graddot"}, {"name": "gradcos"}, {"name": "kfac", "damping": 1e-3}, {"name": "ekfac", "damping": 1e-3}]
#: One kind of layer for each way in which gradients are read; `make soak` takes all.
SOME = (
    "Linear", "Linear over masked tokens", "Linear tied to Linear", "transformers Conv1D over tokens", "Conv2d circular in 2 groups",
    "Embedding with padding", "Embedding of positions (1, T)", "Embedding tied to Linear", "LayerNorm over tokens", "BatchNorm2d",
    "MultiheadAttention", "LSTM", "GPT-2",
)  # fmt: skip
CASES = [*((name, "sampled") for name in SOME), ("Linear", "exact"), ("LayerNorm over tokens", "exact")]
CASES += [pytest.param(name, "sampled", marks=pytest.mark.soak) for name in LAYERS if name not in SOME]
CHAINS = {"step_size": 1e-4, "n_beta": 100.0, "localization": 30.0, "batch_size": 16, "chains": 2, "together": 2}


def outcome(name, fisher, dtype, device=CPU):
    layer = LAYERS[name]
    problem = problem_of(layer, layer.build())
    attributed = inspect(problem, problem.given.to(device=device, dtype=dtype), problem.train)
    return attribute(
        problem, [{**method, **({"fisher": fisher} if "damping" in method else {})} for method in METHODS], attributed=attributed
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "fisher"), CASES)
def test_factors_directions_and_scores_are_the_processors(name, fisher, device):
    wanted = outcome(name, fisher, torch.float64)
    with working_on(device) as there:
        found = outcome(name, fisher, torch.float64, there)
        assert found.attributed.device.type == found.influence.device.type == there.type
        limit = TOLERANCES[device, torch.float64]
        assert apart(found.influence, wanted.influence) < limit
        assert apart(found.self_influence, wanted.self_influence) < limit
        assert apart(found.mass, wanted.mass) < limit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["Linear", "Conv2d depthwise"])
def test_float32_is_float32(name, device):
    wanted = outcome(name, "empirical", torch.float64)
    with working_on(device) as there:
        found = outcome(name, "empirical", torch.float32, ready(there))
        assert apart(found.influence, wanted.influence) < TOLERANCES["cuda", torch.float32]


@pytest.fixture(scope="module")
def setting():
    return Setting()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["cg", "block cg", "astra tuned", *SHORT])
def test_solves_are_the_processors(name, device, setting):
    wanted = {**SOLVERS, **SHORT}[name](setting)
    with working_on(device) as there:
        found = {**SOLVERS, **SHORT}[name](moved(setting, there))
        assert found.x.device.type == there.type
        assert found.steps == wanted.steps
        assert apart(found.x, wanted.x) < TOLERANCES[device, torch.float64]


def moved(setting, there):
    """The same system on a device."""
    from tda.solvers.operator import Operator
    from tda.solvers.preconditioner import ekfac_preconditioner
    from tda.solvers.system import System

    other = Setting.__new__(Setting)
    model = copy.deepcopy(setting.attributed.model).to(there)
    other.attributed = replace(setting.attributed, model=model)
    other.blocks, other.right = setting.blocks, setting.right.to(there)
    operator = Operator(other.attributed, setting.operator.dataset, setting.operator.kind, setting.operator.batch_size)
    other.system = System(operator.product, setting.system.damping.to(there), other.right, len(setting.operator.dataset))
    other.ekfac = ekfac_preconditioner(setting.blocks, placed(setting.factors, there), float(setting.system.damping))
    return other


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [mlp, Residual])
@pytest.mark.parametrize("sampler", ["sgld", "rmsprop"])
def test_chains_go_the_same_way(make, sampler, device):
    problem, attributed = classes(make, torch.float64)
    sampling = Sampling(**CHAINS, sampler=sampler)
    shared = landscape(attributed, sampling, problem.train_data())
    wanted = advance(shared, start(shared, range(2)), 20)
    with working_on(device) as there:
        shared = landscape(replace(attributed, model=copy.deepcopy(attributed.model).to(there)), sampling, problem.train_data())
        found = advance(shared, start(shared, range(2)), 20)
        assert found[0].weights.device.type == there.type
        assert apart(found[0].weights, wanted[0].weights) < TOLERANCES[device, torch.float64]
        assert apart(found[1], wanted[1]) < TOLERANCES[device, torch.float64]


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_the_same_on_every_device(device):
    wanted = Noise(3, [0, 5], torch.zeros(7), 0.5).at(4)
    assert DRAWN_HERE > 1 << 20
    with working_on(device) as there:
        found = Noise(3, [0, 5], torch.zeros(7, device=there), 0.5).at(4)
        assert found.device.type == there.type
        assert torch.equal(found.cpu(), wanted)


class Trained(Given):
    """Trained by a recipe."""

    def model(self):
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()

    def recipe(self):
        return tda.Recipe(2, 4, 0.1, momentum=0.5, weight_decay=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stacked", [True, False])
def test_retrained_models_are_the_processors(stacked, device):
    torch.manual_seed(0)
    train, queries = ([(torch.randn(4), torch.randint(3, ())) for _ in range(n)] for n in (12, 3))
    problem = Trained(None, tda.Categorical(), train, queries)
    some = ([list(range(9)), list(range(3, 12))], [4, 5])
    wanted = retrained(problem, train, queries, *some, stacked=stacked)
    with working_on(device) as there:
        found = retrained(problem, train, queries, *some, stacked=stacked, device=there)
        assert found.device == CPU
        assert apart(found, wanted) < TOLERANCES[device, torch.float64]


def test_a_fit_of_the_users_own_is_given_the_processors_model():
    class Own(Trained):
        def fit(self, model, dataset, *, seed, on_checkpoint):
            assert next(model.parameters()).device == CPU

    problem = Own(None, tda.Categorical(), [(torch.randn(4), torch.tensor(0))])
    assert training_device(problem, PAPER) == CPU
    assert training_device(Trained(None, tda.Categorical(), []), PAPER) == PAPER
    with Elsewhere():
        retrained(problem, problem.train, problem.train, [[0]], [0], stacked=False, device=PAPER)


def test_what_is_left_behind_on_another_device_fails():
    """The tests above would prove nothing if the device on paper let two devices meet."""
    with Elsewhere():
        there, here = torch.ones(3, device=PAPER), torch.ones(3)
        for mixed in (lambda: there + here, lambda: here.add_(there.sum()), lambda: torch.cat([there, here]), lambda: there @ here):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="same device"):
            here[torch.tensor([0, 1]).to(PAPER)]
        assert torch.equal((there * torch.tensor(2.0) + there[torch.tensor([2])]).cpu(), torch.full((3,), 3.0))


def test_trees_are_moved_and_brought_home_whole():
    tree = ({"a": [Dense(torch.ones(2)), None, "text"]}, tda.Batch(torch.zeros(1), torch.zeros(2)), 3)
    assert placed(tree, CPU) is tree
    with Elsewhere():
        there = placed(tree, PAPER)
        assert there[0]["a"][0].matrix.device == there[1].targets.device == PAPER
        assert (there[0]["a"][1:], there[2], type(there[1])) == ([None, "text"], 3, tda.Batch)
        back = home(there)
        assert torch.equal(back[0]["a"][0].matrix, torch.ones(2))
        assert back[1].inputs.device == CPU


def test_batches_lie_where_they_are_asked_for():
    problem = Given(None, tda.Gaussian(), [({"x": torch.ones(2), "name": "a"}, torch.ones(1))] * 2)
    with Elsewhere():
        batch = load_batch(problem, problem.train, [0, 1], dtype=torch.float64, device=PAPER)
        assert batch.inputs["x"].device == batch.targets.device == PAPER
        assert batch.inputs["x"].dtype == torch.float64
        assert batch.inputs["name"] == ["a", "a"]


def test_without_a_gpu_auto_is_the_processor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_here("auto") == device_here("cpu") == CPU
    assert named("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Some {device.type}")
    assert device_here("auto") == device_here("cuda") == torch.device("cuda")
    assert (named("auto"), named("cpu")) == ("Some cuda", "cpu")


def test_a_process_that_uses_a_gpu_computes_no_tf32():
    kernels = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    before = [each.fp32_precision for each in kernels]
    try:
        assert ready(torch.device("cuda")) == torch.device("cuda")
        assert [each.fp32_precision for each in kernels] == ["ieee"] * 3
        assert not kernels[0].allow_bf16_reduced_precision_reduction
        assert not kernels[0].allow_fp16_reduced_precision_reduction
    finally:
        for each, precision in zip(kernels, before, strict=True):
            each.fp32_precision = precision
        kernels[0].allow_bf16_reduced_precision_reduction = kernels[0].allow_fp16_reduced_precision_reduction = True
