"""Regression: the diabetes data that scikit-learn ships, 442 patients with ten measurements and the progression of the disease."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tda
from tda.recipe import Recipe

Measured = Literal["loss", "absolute_error", "prediction"]
HELD_OUT = 100


def prediction(outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG001  (the form of a measurement)
    """The predicted number itself, shape (batch,): neither direction of it is good news."""
    return outputs.reshape(len(outputs), -1).sum(1)


class _Patients(tda.Problem):
    """What the problems of this module share: 342 patients to train on, `queries` of the 100 others; all standardised by the first.

    measurement: "loss" (half the squared error), "absolute_error", or "prediction".
    """

    likelihood = tda.Gaussian()

    def __init__(self, queries: int, measurement: Measured) -> None:
        if not 1 <= queries <= HELD_OUT:
            raise tda.InputError(f"queries must be in 1..{HELD_OUT}, the patients that are not trained on; got {queries}")
        if measurement not in ("loss", "absolute_error", "prediction"):
            raise tda.InputError(f'measurement must be "loss", "absolute_error" or "prediction", got {measurement!r}')
        self.queries = queries
        if measurement != "loss":
            self.measurement = tda.absolute_error if measurement == "absolute_error" else prediction  # type: ignore[method-assign]

    @cached_property
    def _split(self) -> tuple[np.ndarray, ...]:
        """Inputs and targets: of training, of the others, of training, of the others."""
        inputs, targets = load_diabetes(return_X_y=True)
        train, test, known, asked = train_test_split(inputs, targets[:, None], test_size=HELD_OUT, random_state=0)
        inputs = [(part - train.mean(0)) / train.std(0) for part in (train, test)]
        return *inputs, *((part - known.mean(0)) / known.std(0) for part in (known, asked))

    def train_data(self) -> TensorDataset:
        """Inputs (10,) and progression (1,)."""
        return TensorDataset(torch.from_numpy(self._split[0]), torch.from_numpy(self._split[2]))

    def query_data(self) -> TensorDataset:
        """The first `queries` of the others."""
        return TensorDataset(*(torch.from_numpy(part[: self.queries]) for part in (self._split[1], self._split[3])))

    def describe(self, split: str, i: int) -> dict[str, str]:
        """The patient's measurements, in standard deviations from the mean."""
        names = ("age", "sex", "bmi", "blood pressure", "s1", "s2", "s3", "s4", "s5", "s6")
        row, target = (self._split[place + (split != "train")][i] for place in (0, 2))
        return {"progression": f"{target[0]:.2f}", **{name: f"{value:.2f}" for name, value in zip(names, row, strict=True)}}


class Diabetes(_Patients):
    """An MLP with tanh on the diabetes data. width, depth: of the hidden layers. epochs: of SGD with momentum."""

    def __init__(self, width: int = 16, depth: int = 1, epochs: int = 60, queries: int = 100, measurement: Measured = "loss") -> None:
        super().__init__(queries, measurement)
        self.width, self.depth, self.epochs = width, depth, epochs

    def model(self) -> nn.Module:
        """Linear layers with tanh between them: 10 -> width x depth -> 1."""
        widths = [10, *[self.width] * self.depth]
        layers: list[nn.Module] = []
        for into, out in pairwise(widths):
            layers += [nn.Linear(into, out), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def recipe(self) -> Recipe:
        """SGD with momentum, and a weight decay that keeps so few patients from being learnt by heart."""
        return Recipe(self.epochs, 32, 0.02, momentum=0.9, weight_decay=1e-2)


class RidgeDiabetes(_Patients):
    """Ridge regression, solved exactly: influence is known in closed form, so that methods and evaluation can be tested against it.

    fit minimises mean 0.5 (x w + b - y)^2 + 0.5 penalty (|w|^2 + b^2), so that `ggn` or `hessian` with damping = penalty is exact.
    """

    def __init__(self, penalty: float = 0.1, queries: int = 100, measurement: Measured = "prediction") -> None:
        super().__init__(queries, measurement)
        if penalty <= 0:
            raise tda.InputError(f"penalty must be above 0, got {penalty}")
        self.penalty = penalty

    def model(self) -> nn.Module:
        """One linear layer, 10 -> 1, in float64."""
        return nn.Linear(10, 1, dtype=torch.float64)

    def fit(self, model: nn.Module, dataset: Any, *, seed: int, on_checkpoint: Callable[..., None]) -> None:
        """Solve the normal equations; nothing depends on the seed."""
        inputs, targets = (torch.stack(side).double() for side in zip(*(dataset[i] for i in range(len(dataset))), strict=True))
        rows = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
        matrix = rows.T @ rows / len(rows) + self.penalty * torch.eye(rows.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(matrix, rows.T @ targets / len(rows))
        with torch.no_grad():
            model.weight.copy_(solution[:-1].T)  # type: ignore[operator]
            model.bias.copy_(solution[-1])  # type: ignore[operator]
