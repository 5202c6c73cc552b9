"""UCI digits: 1,797 images of 8 x 8 pixels that scikit-learn ships, and an MLP that learns to read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import TensorDataset

import tda

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, BATCH = 0.05, 0.9, 1e-3, 64


class Digits(tda.Problem):
    """An MLP with ReLU on standardised digits: 1,437 training images and `queries` of the 360 others.

    width, depth: of the hidden layers. epochs: of SGD with momentum. The split is fixed; the seed of the training is the run's.
    """

    likelihood = tda.Categorical()

    def __init__(self, width: int = 32, depth: int = 2, epochs: int = 30, queries: int = 100) -> None:
        self.width, self.depth, self.epochs, self.queries = width, depth, epochs, queries

    @cached_property
    def _split(self) -> tuple[np.ndarray, ...]:
        images, labels = load_digits(return_X_y=True)
        train, test, *labels_ = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
        return train, test, *labels_

    def _tensors(self, images: np.ndarray, labels: np.ndarray) -> TensorDataset:
        train = self._split[0]
        # Corner pixels hardly vary: the floor keeps them from being blown up.
        standard = (images - train.mean(0)) / np.maximum(train.std(0), 0.8)
        return TensorDataset(torch.from_numpy(standard.astype(np.float32)), torch.from_numpy(labels.astype(np.int64)))

    def model(self) -> nn.Module:
        """Linear layers with ReLU between them: 64 -> width x depth -> 10."""
        widths = [64, *[self.width] * self.depth]
        layers: list[nn.Module] = []
        for into, out in pairwise(widths):
            layers += [nn.Linear(into, out), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 10))

    def train_data(self) -> TensorDataset:
        """Standardised images (64,) and classes."""
        return self._tensors(self._split[0], self._split[2])

    def query_data(self) -> TensorDataset:
        """The first `queries` test images."""
        return self._tensors(self._split[1][: self.queries], self._split[3][: self.queries])

    def fit(self, model: nn.Module, dataset: Any, *, seed: int, on_checkpoint: Callable[..., None]) -> None:
        """SGD with momentum; the order of the examples follows the seed."""
        inputs, targets = dataset[range(len(dataset))]
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
        model.train()
        for _ in range(self.epochs):
            for ids in torch.randperm(len(inputs), generator=generator).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[ids]), targets[ids]).backward()
                optimizer.step()
        on_checkpoint(model=model, learning_rate=LEARNING_RATE)

    def describe(self, split: str, i: int) -> np.ndarray:
        """The image (8, 8), dark ink on white, as bytes."""
        image = self._split[0 if split == "train" else 1][i].reshape(8, 8)
        shown: np.ndarray = (255 - image * (255 / 16)).astype(np.uint8)
        return shown
