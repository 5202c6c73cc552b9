"""Documents as examples of a problem: checked, cut or packed, shifted by one for next-token labels, padded in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tda.errors import InputError
from tda.language.documents import MASKED, Documents

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Sequences:
    """Map-style dataset of token sequences: dataset[i] -> ({"input_ids", "attention_mask"}: (tokens,) int64, targets).

    Targets are the class () of a document that has one; else (tokens,) int64, the label of the following token, MASKED at the end.
    limit: the most tokens of an example; longer ones are cut where `truncate` says so. vocabulary: ids are below it.
    packed: whether examples are consecutive pieces of one stream, so that the last token of one predicts the first of the next.
    """

    documents: Documents
    split: str
    limit: int
    vocabulary: int
    truncate: bool = False
    packed: bool = False

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: int) -> tuple[Inputs, Tensor]:
        """Raises InputError, by the example's number, where it is empty, too long, or has ids beyond the vocabulary."""
        start, stop = self._span(i)
        ids = np.asarray(self.documents.ids[start:stop]).astype(np.int64)
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            bad = int(ids[(ids < 0) | (ids >= self.vocabulary)][0])
            raise InputError(
                f"{self.documents.name(self.split, i)} has the token {bad}, and the model's embedding has tokens 0..{self.vocabulary - 1}; "
                "use the tokenizer that the model was trained with"
            )
        inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.ones(len(ids), dtype=torch.int64)}
        if self.documents.classes is not None:
            return inputs, torch.tensor(int(self.documents.classes[i]))
        return inputs, torch.from_numpy(self._following(start, stop))

    def _span(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, stop = int(self.documents.ends[i]), int(self.documents.ends[i + 1])
        name = self.documents.name(self.split, i)
        if stop == start:
            raise InputError(f"{name} is an empty document; remove it")
        if stop - start > self.limit and not self.truncate:
            raise InputError(
                f"{name} has {stop - start} tokens, and an example may have {self.limit}; "
                "set truncate = true to cut it, packing = true to spread it over examples, or a larger max_length where the model takes it"
            )
        return start, min(stop, start + self.limit)

    def lengths(self) -> Any:
        """Tokens of every example, (examples,) int64: none is read."""
        return np.minimum(np.diff(self.documents.ends), self.limit).clip(1)

    def _following(self, start: int, stop: int) -> Any:
        """Labels of the following tokens of [start, stop), (tokens,) int64."""
        last = min(stop + 1, int(self.documents.ends[-1]) + self.documents.after) if self.packed else stop
        labels = np.asarray(self.documents.labels[start + 1 : last]).astype(np.int64)
        return np.concatenate([labels, np.full(stop - start - len(labels), MASKED)])

    def unlabelled(self) -> list[int]:
        """Examples without a label: their loss is 0, and so is every score."""
        if self.documents.classes is not None:
            return []
        return [i for i in range(len(self)) if not (self._following(*self._span(i)) != MASKED).any()]


def pack(documents: Documents, limit: int) -> Documents:
    """The documents as one stream, cut every `limit` tokens. Every token but the stream's first is the target of one position.

    A last token that would stand alone is nobody's input: it has no successor to predict.
    """
    total = int(documents.ends[-1])
    ends = np.append(np.arange(0, max(total - 1, 1), limit), min(total, -(-max(total - 1, 1) // limit) * limit))
    return replace(documents, ends=ends, names=None, after=total - int(ends[-1]))


def collate(examples: Sequence[tuple[Inputs, Tensor]], pad: int) -> tuple[Inputs, Tensor]:
    """A batch: (batch, tokens) inputs padded on the right with `pad`, attention_mask 0 there; targets stacked, or padded with MASKED."""

    def padded(key: str, value: int) -> Tensor:
        return pad_sequence([inputs[key] for inputs, _ in examples], batch_first=True, padding_value=value)

    inputs = {"input_ids": padded("input_ids", pad), "attention_mask": padded("attention_mask", 0)}
    targets = [target for _, target in examples]
    if targets[0].ndim == 0:
        return inputs, torch.stack(targets)
    return inputs, pad_sequence(targets, batch_first=True, padding_value=MASKED)
