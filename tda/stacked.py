"""Many models trained at once by one recipe: parameters stacked along a first axis, one batched product where there were many small ones.

Each model has its own initial weights, subset and batch order, and ends with the numbers that `Problem.fit` gives it alone, up to the
rounding of the products. Shape suffixes: M models, B examples of a batch, n examples of a subset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils.data import Subset

from tda.device import CPU
from tda.errors import cause
from tda.problem import Batch, Problem
from tda.recipe import Recipe, load_all, orders, rows
from tda.stacked_cnn import cnn_gradients
from tda.stacked_mlp import mlp_gradients

#: (parameters (M, ...) each, inputs (M, B, ...), targets (M, B, ...)) -> gradients of each model's mean loss, like the parameters.
Gradients = Callable[[list[Tensor], Any, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Stack:
    """Models of one architecture: `parameters` by name, (M, ...) each; `skeleton` is one of them, whose own weights do not count."""

    problem: Problem
    skeleton: nn.Module
    parameters: dict[str, Tensor]

    def state(self, m: int) -> dict[str, Tensor]:
        """The weights of one model."""
        return {name: tensor[m].clone() for name, tensor in self.parameters.items()}

    def outputs(self, batch: Batch) -> Tensor:
        """Every model's outputs of one batch, (M, B, ...), without gradients."""
        wrapped = Predict(self.problem, self.skeleton.eval())
        with torch.no_grad():
            return vmap(wrapped.outputs, in_dims=(0, None, None))(self.parameters, batch.inputs, batch.targets)


class Predict(nn.Module):
    """Problem.predict as a module's forward, so that the model's weights can be put in its place."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        super().__init__()
        self.problem, self.model = problem, model

    def forward(self, inputs: Any, targets: Tensor) -> Tensor:
        """What the problem predicts."""
        return self.problem.predict(self.model, Batch(inputs, targets))

    def outputs(self, parameters: dict[str, Tensor], inputs: Any, targets: Tensor) -> Tensor:
        """The outputs under the given weights."""
        found: Tensor = functional_call(self, {f"model.{name}": value for name, value in parameters.items()}, (inputs, targets))
        return found


def fit_stack(
    problem: Problem,
    dataset: Any,
    subsets: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device = CPU,
) -> Stack:
    """Train one model on each subset of the dataset with its seed, by the problem's recipe; subsets are of one length.

    Ask `unstackable` first. Equals `tda.evaluation.retraining.retrain` for each pair (subset, seed).
    """
    recipe = problem.recipe()
    assert recipe is not None, "only what has a recipe can be stacked"
    return _fit(problem, recipe, dataset, subsets, _initial(problem, seeds, dtype, device), seeds)


def _fit(
    problem: Problem,
    recipe: Recipe,
    dataset: Any,
    subsets: Sequence[Sequence[int]],
    initial: tuple[nn.Module, dict[str, Tensor]],
    seeds: Sequence[int],
) -> Stack:
    skeleton, parameters = initial
    stack = Stack(problem, skeleton, parameters)
    trained = [parameters[name] for name, parameter in skeleton.named_parameters() if parameter.requires_grad]
    whole = load_all(problem, dataset, trained[0])
    by_hand = mlp_gradients(problem, skeleton, whole) or cnn_gradients(problem, skeleton, whole)
    gradients = by_hand or _any_gradients(stack)
    ids_Mn = torch.tensor([list(ids) for ids in subsets]).to(whole.targets.device)
    momenta = [torch.zeros_like(parameter) for parameter in trained]
    start = [parameter.clone() for parameter in trained] if recipe.proximity else []
    skeleton.train()
    for epoch in zip(*(orders(recipe, ids_Mn.shape[1], seed) for seed in seeds), strict=True):
        for ids_MB in ids_Mn.gather(1, torch.stack(epoch).to(ids_Mn.device)).split(recipe.batch_size, 1):
            batch = rows(whole, ids_MB)
            _step(recipe, trained, start, momenta, gradients(trained, batch.inputs, batch.targets))
    return stack


def _step(recipe: Recipe, parameters: list[Tensor], start: list[Tensor], momenta: list[Tensor], gradients: list[Tensor]) -> None:
    """One step of torch.optim.SGD on all models, its operations in its order; `gradients` are overwritten. start: where they began."""
    with torch.no_grad():
        if recipe.proximity:
            torch._foreach_add_(gradients, parameters, alpha=recipe.proximity)
            torch._foreach_add_(gradients, start, alpha=-recipe.proximity)
        if recipe.weight_decay:
            torch._foreach_add_(gradients, parameters, alpha=recipe.weight_decay)
        if recipe.momentum:
            torch._foreach_mul_(momenta, recipe.momentum)
            torch._foreach_add_(momenta, gradients)
            gradients = momenta
        torch._foreach_add_(parameters, gradients, alpha=-recipe.learning_rate)


def _initial(
    problem: Problem, seeds: Sequence[int], dtype: torch.dtype | None, device: torch.device
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A skeleton, and the stacked weights of a fresh model per seed."""
    models = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(problem.model().to(device=device, dtype=dtype))
    states = [dict(model.named_parameters()) for model in models]
    return models[0], {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


def _any_gradients(stack: Stack) -> Gradients:
    """Gradients of any architecture, through vmap and autograd: models do not share weights, so that their losses may be summed."""
    wrapped, likelihood = Predict(stack.problem, stack.skeleton), stack.problem.likelihood
    names = list(stack.parameters)
    learnt = [name for name, parameter in stack.skeleton.named_parameters() if parameter.requires_grad]

    def loss(values: dict[str, Tensor], inputs: Any, targets: Tensor) -> Tensor:
        return likelihood.loss(wrapped.outputs(values, inputs, targets), targets).mean()

    def gradients(parameters: list[Tensor], inputs: Any, targets: Tensor) -> list[Tensor]:
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        values = {name: stack.parameters[name] for name in names} | dict(zip(learnt, leaves, strict=True))
        losses = vmap(loss)(values, inputs, targets)
        # A parameter that is not used raises here: alone it would be left as it is, without even weight decay.
        return list(torch.autograd.grad(losses.sum(), leaves))

    return gradients


def unstackable(problem: Problem, dataset: Any, *, dtype: torch.dtype | None = None) -> str:
    """Why the problem's models cannot be trained many at once; empty where they can. Tries it on two models and a few steps."""
    recipe = problem.recipe()
    if recipe is None or type(problem).fit is not Problem.fit:
        return f"{type(problem).__name__} {'has no recipe()' if recipe is None else 'defines its own fit'}"
    with torch.random.fork_rng(devices=[]):
        model = problem.model()
    if next(model.buffers(), None) is not None:
        return f"the model has buffers ({next(name for name, _ in model.named_buffers())})"
    count = min(len(dataset), recipe.batch_size + recipe.batch_size // 2 + 1)
    ids = [range(count), range(len(dataset) - count, len(dataset))]
    short = replace(recipe, epochs=1)
    try:
        stack = _fit(problem, short, dataset, ids, _initial(problem, [0, 1], dtype, CPU), [0, 1])
        apart = max(_distance(problem, short, dataset, ids[m], m, stack.state(m)) for m in range(2))
    except Exception as error:  # noqa: BLE001  (what vmap cannot do, it says in many ways)
        return f"torch cannot batch the model: {cause(error)}"
    return "" if apart < 1e-4 else f"trained together, two models differ by {apart:.1e} from themselves trained alone"


def _distance(problem: Problem, recipe: Recipe, dataset: Any, ids: Sequence[int], seed: int, state: dict[str, Tensor]) -> float:
    """Relative distance of a stacked model from the same one trained alone."""
    from tda.recipe import train

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = problem.model().to(next(iter(state.values())).dtype)
        train(problem, recipe, model, Subset(dataset, list(ids)), seed=seed, on_checkpoint=lambda **_: None)
    alone = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    together = torch.cat([state[name].flatten() for name, _ in model.named_parameters()])
    return float((alone - together).norm() / alone.norm())
