"""UCI digits: 1,797 images of 8 x 8 pixels that scikit-learn ships, and small networks that learn to read them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

import tda
from tda.recipe import Recipe

Measured = Literal["loss", "margin"]


class _Images(tda.Problem):
    """What the problems of this module share: the images, their split, mislabelled examples, and what is measured.

    queries: how many of the test images are queries. label_noise: so large a share of the training labels is replaced by another class
    drawn at random, the same ones every time; `mislabelled` says which. measurement: "loss" (lower is better), or "margin", the
    log-odds of the right class (higher is better).
    """

    likelihood = tda.Categorical()
    #: Test images of the fixed split, the least standard deviation by which a pixel is divided, and one example's shape.
    held_out: int
    floor: float
    shape: tuple[int, ...] = (64,)

    def __init__(self, queries: int, label_noise: float, measurement: Measured) -> None:
        if not 1 <= queries <= self.held_out:
            raise tda.InputError(f"queries must be in 1..{self.held_out}, the images that are not trained on; got {queries}")
        if not 0 <= label_noise <= 1:
            raise tda.InputError(f"label_noise must be a share in [0, 1], got {label_noise}")
        if measurement not in ("loss", "margin"):
            raise tda.InputError(f'measurement must be "loss" or "margin", got {measurement!r}')
        self.queries, self.label_noise = queries, label_noise
        if measurement == "margin":
            self.better = "higher"
            self.measurement = tda.margin  # type: ignore[method-assign]

    @cached_property
    def _split(self) -> tuple[np.ndarray, ...]:
        images, labels = load_digits(return_X_y=True)
        train, test, *labels_ = train_test_split(images, labels, test_size=self.held_out, random_state=0, stratify=labels)
        return train, test, *labels_

    @cached_property
    def _noisy(self) -> tuple[np.ndarray, np.ndarray]:
        """Labels of the training images after the noise, and which are wrong."""
        labels = self._split[2]
        random = np.random.Generator(np.random.Philox(0))
        order, shifts = random.permutation(len(labels)), random.integers(1, 10, len(labels))
        wrong = np.zeros(len(labels), bool)
        wrong[order[: round(self.label_noise * len(labels))]] = True
        return np.where(wrong, (labels + shifts) % 10, labels), wrong

    @property
    def mislabelled(self) -> np.ndarray:
        """(train,) bool: which training labels were replaced."""
        return self._noisy[1]

    def _tensors(self, images: np.ndarray, labels: np.ndarray) -> TensorDataset:
        train = self._split[0]
        spread = np.maximum(train.std(0), self.floor)
        standard = (images - train.mean(0)) / np.where(spread > 0, spread, 1.0)
        inputs = torch.from_numpy(standard.astype(np.float32)).view(-1, *self.shape)
        return TensorDataset(inputs, torch.from_numpy(labels.astype(np.int64)))

    def train_data(self) -> TensorDataset:
        """Standardised images and classes."""
        return self._tensors(self._split[0], self._noisy[0])

    def query_data(self) -> TensorDataset:
        """The first `queries` test images."""
        return self._tensors(self._split[1][: self.queries], self._split[3][: self.queries])

    def describe(self, split: str, i: int) -> np.ndarray:
        """The image (8, 8), dark ink on white, as bytes."""
        image = self._split[0 if split == "train" else 1][i].reshape(8, 8)
        shown: np.ndarray = (255 - image * (255 / 16)).astype(np.uint8)
        return shown


def _mlp(width: int, depth: int) -> nn.Module:
    """Linear layers with ReLU between them: 64 -> width x depth -> 10."""
    widths = [64, *[width] * depth]
    layers: list[nn.Module] = []
    for into, out in pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 10))


class Digits(_Images):
    """An MLP with ReLU on standardised digits: 1,437 training images and `queries` of the 360 others.

    width, depth: of the hidden layers. epochs: of SGD with momentum. The split is fixed; the seed of the training is the run's.
    queries, label_noise and measurement: how many are asked about, the share of wrong training labels, "loss" or "margin".
    """

    held_out = 360
    floor = 0.8  # corner pixels hardly vary: this keeps them from being blown up

    def __init__(
        self,
        width: int = 32,
        depth: int = 2,
        epochs: int = 30,
        queries: int = 100,
        label_noise: float = 0.0,
        measurement: Measured = "loss",
    ) -> None:
        super().__init__(queries, label_noise, measurement)
        self.width, self.depth, self.epochs = width, depth, epochs

    def model(self) -> nn.Module:
        """Linear layers with ReLU between them: 64 -> width x depth -> 10."""
        return _mlp(self.width, self.depth)

    def recipe(self) -> Recipe:
        """SGD with momentum and a little weight decay."""
        return Recipe(self.epochs, 64, 0.05, momentum=0.9, weight_decay=1e-3)


class FewDigits(Digits):
    """The images of a few classes: what a model that has learnt all of `Digits` is fine-tuned on, pulled to where it begins.

    classes: which. proximity: of the recipe, and what `multistage` is told. width, depth: those of the model that it starts from.
    """

    def __init__(
        self,
        classes: Sequence[int] = (3, 8),
        proximity: float = 0.1,
        width: int = 32,
        depth: int = 2,
        epochs: int = 20,
        queries: int = 50,
        measurement: Measured = "loss",
    ) -> None:
        super().__init__(width, depth, epochs, queries, 0.0, measurement)
        if not classes or not set(classes) <= set(range(10)):
            raise tda.InputError(f"classes must be some of the digits 0 to 9, got {list(classes)}")
        self.classes, self.proximity = tuple(classes), proximity

    def _ids(self, split: str) -> np.ndarray:
        """Which images of a split of `Digits` are of these classes."""
        return np.flatnonzero(np.isin(self._split[2 if split == "train" else 3], self.classes))

    def train_data(self) -> TensorDataset:
        """Standardised images of these classes."""
        ids = self._ids("train")
        return self._tensors(self._split[0][ids], self._split[2][ids])

    def query_data(self) -> TensorDataset:
        """The first `queries` test images of these classes, or as many as there are."""
        ids = self._ids("query")[: self.queries]
        return self._tensors(self._split[1][ids], self._split[3][ids])

    def describe(self, split: str, i: int) -> np.ndarray:
        """As `Digits` does."""
        return super().describe(split, int(self._ids(split)[i]))

    def recipe(self) -> Recipe:
        """SGD with momentum, pulled to the weights that training starts from."""
        return Recipe(self.epochs, 64, 0.05, momentum=0.9, proximity=self.proximity)


class DigitsCNN(_Images):
    """A small convolutional network on standardised digits (1, 8, 8): the data and the training of `Digits`.

    width: channels of the first convolution; the second, of stride 2, has twice as many.
    """

    held_out = 360
    floor = 0.8
    shape = (1, 8, 8)

    def __init__(
        self, width: int = 8, epochs: int = 30, queries: int = 100, label_noise: float = 0.0, measurement: Measured = "loss"
    ) -> None:
        super().__init__(queries, label_noise, measurement)
        self.width, self.epochs = width, epochs

    def model(self) -> nn.Module:
        """Two 3 x 3 convolutions with ReLU, (width, 8, 8) and (2 width, 4, 4), and a linear layer."""
        first, second = nn.Conv2d(1, self.width, 3, padding=1), nn.Conv2d(self.width, 2 * self.width, 3, stride=2, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * self.width, 10))

    def recipe(self) -> Recipe:
        """As for `Digits`."""
        return Recipe(self.epochs, 64, 0.05, momentum=0.9, weight_decay=1e-3)


class PaperDigits(_Images):
    """The digits of "Better Hessians Matter" (2509.23437): 90/10 split (1,617 and 180 images), standardised, an MLP of equal widths.

    SGD with momentum .9 and batches of 32, no weight decay. Their grid is width 32, 64, 128; depth 1, 4, 8; epochs 10, 100, 1000. The
    paper's learning rate is not known to us: .01 trains all of the grid.
    """

    held_out = 180
    floor = 0.0

    def __init__(
        self,
        width: int = 32,
        depth: int = 1,
        epochs: int = 100,
        learning_rate: float = 0.01,
        queries: int = 100,
        label_noise: float = 0.0,
        measurement: Measured = "loss",
    ) -> None:
        super().__init__(queries, label_noise, measurement)
        self.width, self.depth, self.epochs, self.learning_rate = width, depth, epochs, learning_rate

    def model(self) -> nn.Module:
        """Linear layers with ReLU between them: 64 -> width x depth -> 10."""
        return _mlp(self.width, self.depth)

    def recipe(self) -> Recipe:
        """SGD with momentum."""
        return Recipe(self.epochs, 32, self.learning_rate, momentum=0.9)
