"""Tokenised documents: of text and a tokenizer, of records that hold token ids, or of a Zarr group of token arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tda import location
from tda.errors import InputError
from tda.language.records import Record, records

#: A label that does not count.
MASKED = -100
#: So many tokens of a Zarr array are read at a time.
WINDOW = 2**20

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Fields:
    """Names of what a record holds. A record with `input_ids` (and `labels`) is tokenised already."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    label: str = "label"


@dataclass(frozen=True)
class Documents:
    """Token ids and labels of documents, one after the other; document i is [ends[i], ends[i + 1]).

    labels[t] is token t itself, or MASKED where it is not to be predicted. classes: a label per document, or None. names: what
    document i is called in its file, or None. after: 1 where one token more, behind the last document, is a target and no input.
    ids and labels are anything that gives an array for a slice.
    """

    ids: Any
    labels: Any
    ends: Ids
    source: str
    classes: Sequence[Any] | None = None
    names: Sequence[str] | None = None
    after: int = 0

    def __len__(self) -> int:
        return len(self.ends) - 1

    def name(self, split: str, i: int) -> str:
        """A document for people: "train example 3 (data.jsonl, line 4)"."""
        place = self.source.rpartition("/")[2] + (f", {self.names[i]}" if self.names else "")
        return f"{split} example {i} ({place})"


def open_documents(url: str, split: str, *, fields: Fields, tokenizer: Any, end: bool, classes: Mapping[str, int] | None) -> Documents:
    """The documents of a file, a folder or a Zarr group, on a disk or object storage.

    tokenizer: of transformers, or None where the data are token ids. end: whether the tokenizer's end-of-text token follows each text.
    classes: numbers of class names, where a label per document is wanted; None: labels are tokens.
    Raises InputError where the data cannot be read, a record lacks its fields, or a document is empty, by its number and place.
    """
    where = location.resolve(url)
    if where.endswith(".zarr"):
        return _zarr(where, labelled=classes is not None)
    encoder = _Encoder(where, split, fields, tokenizer, end, classes)
    for place, record in records(where):
        encoder.add(place, record)
    return encoder.documents()


@dataclass
class _Encoder:
    """Collects documents from records."""

    source: str
    split: str
    fields: Fields
    tokenizer: Any
    end: bool
    classes: Mapping[str, int] | None
    ids: list[NDArray[np.int32]] = field(default_factory=list)
    labels: list[NDArray[np.int32]] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add(self, place: str, record: Record) -> None:
        """One record. Raises InputError by its place."""
        name = f"{self.split} example {len(self.ids)} ({self.source.rpartition('/')[2]}, {place})"
        ids, labels = self._encoded(record, name)
        if not ids:
            raise InputError(f"{name} is an empty document; remove it")
        if len(labels) != len(ids):
            raise InputError(
                f"{name} has {len(ids)} input_ids and {len(labels)} labels; give one label per token, -100 where there is none"
            )
        if self.classes is not None:
            self.found.append(_class(record, self.fields.label, self.classes, name))
        self.ids.append(np.asarray(ids, np.int32))
        self.labels.append(np.asarray(labels, np.int32))
        self.names.append(place)

    def _encoded(self, record: Record, name: str) -> tuple[Sequence[int], Sequence[int]]:
        f = self.fields
        if record.get("input_ids") is not None:
            given = record.get("labels")
            return _integers(record["input_ids"], name), _integers(record["input_ids"] if given is None else given, name)
        if f.completion in record and self.classes is None:
            prompt, completion = self._text(record, f.prompt, name), self._text(record, f.completion, name)
            before = self._tokens(prompt, name, special=True) if prompt.strip() else []
            after = self._tokens(completion, name) + self._ending(name) if completion.strip() else []
            return before + after, [MASKED] * len(before) + after
        text = self._text(record, f.text, name)
        ids = self._tokens(text, name, special=True) + self._ending(name) if text.strip() else []
        return ids, ids

    def _text(self, record: Record, key: str, name: str) -> str:
        if key not in record:
            has = ", ".join(list(record)[:8]) or "nothing"
            raise InputError(f"{name} has no field {key!r}; it has {has}: name the right one in [problem_options]")
        if not isinstance(record[key], str):
            raise InputError(f"{name}: field {key!r} is {type(record[key]).__name__}, not text")
        return str(record[key])

    def _tokens(self, text: str, name: str, *, special: bool = False) -> list[int]:
        if self.tokenizer is None:
            raise InputError(f"{name} is text, and there is no tokenizer; give the option `tokenizer`, or token ids as `input_ids`")
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _ending(self, name: str) -> list[int]:
        if not self.end:
            return []
        if self.tokenizer is None or self.tokenizer.eos_token_id is None:
            raise InputError(f"{name}: end = true, and the tokenizer has no end-of-text token; set end = false")
        return [int(self.tokenizer.eos_token_id)]

    def documents(self) -> Documents:
        """All of them."""
        if not self.ids:
            raise InputError(f"{self.source} holds no document: there is nothing to attribute; check the path")
        ends = np.concatenate([[0], np.cumsum([len(each) for each in self.ids])])
        classes = None if self.classes is None else self.found
        return Documents(np.concatenate(self.ids), np.concatenate(self.labels), ends, self.source, classes, self.names)


def _integers(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or any(isinstance(each, bool) or not isinstance(each, int) for each in value):
        raise InputError(f"{name}: input_ids and labels must be lists of whole numbers")
    return value


def _class(record: Record, key: str, classes: Mapping[str, int], name: str) -> int:
    label = record.get(key)
    if isinstance(label, str) and label in classes:
        return classes[label]
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        return label
    known = ", ".join(list(classes)[:8])
    raise InputError(f"{name}: {key} is {label!r}; it must be one of the model's {len(classes)} classes, by number or name ({known})")


class _Rows:
    """Rows of a Zarr array, (rows,) or (rows, tokens), read a window at a time; the last window is kept."""

    def __init__(self, array: Any) -> None:
        self._array = array
        chunk = int(array.chunks[0])
        row = int(np.prod(array.shape[1:], dtype=np.int64))
        self._step = max(chunk, WINDOW // max(row, 1) // chunk * chunk)
        self._at, self._window = -1, np.empty(0)

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop)."""
        parts = []
        for k in range(start // self._step, -(-stop // self._step)):
            if k != self._at:
                self._at, self._window = k, np.asarray(self._array[k * self._step : (k + 1) * self._step])
            parts.append(self._window[max(start - k * self._step, 0) : stop - k * self._step])
        return np.concatenate(parts) if parts else np.empty(0, self._array.dtype)


@dataclass(frozen=True)
class _Ragged:
    """Slices of the tokens that count, out of rows of equal width; ends as of Documents. width 0: the tokens lie in one row."""

    array: _Rows
    ends: Ids
    width: int

    def __getitem__(self, piece: slice) -> NDArray[Any]:
        if not self.width:
            return self.array.rows(piece.start, piece.stop)
        first = int(np.searchsorted(self.ends, piece.start, "right")) - 1
        last = int(np.searchsorted(self.ends, piece.stop, "left"))
        rows, lengths = self.array.rows(first, last), np.diff(self.ends[first : last + 1])
        flat = rows[np.arange(self.width) < lengths[:, None]]
        return flat[piece.start - self.ends[first] : piece.stop - self.ends[first]]


def _zarr(url: str, *, labelled: bool) -> Documents:
    """A group with `tokens` (documents, tokens), or (all tokens,) with or without `lengths` (documents,); and perhaps `labels`."""
    try:
        group = location.open_group(url)
    except FileNotFoundError as error:
        raise InputError(f"data {url} do not exist, or are no Zarr group; correct the path") from error
    arrays = dict(group.arrays())
    tokens = arrays.get("tokens")
    if tokens is None or tokens.ndim not in (1, 2) or tokens.dtype.kind not in "iu":
        raise InputError(
            f"{url} has no array `tokens` of whole numbers, (documents, tokens) or (tokens,); it has {', '.join(arrays) or 'none'}"
        )
    ends = _ends(url, tokens, arrays.get("lengths"))
    labels = arrays.get("labels")
    wanted = (len(ends) - 1,) if labelled else tokens.shape
    if labelled and labels is None:
        raise InputError(f"{url} has no array `labels`; sequence classification needs one class per document")
    if labels is not None and labels.shape != wanted:
        raise InputError(f"{url}: labels are of shape {labels.shape}, and should be {wanted}")
    width = tokens.shape[1] if tokens.ndim == 2 else 0
    ids = _Ragged(_Rows(tokens), ends, width)
    marks = _Ragged(_Rows(labels), ends, width) if labels is not None and not labelled else ids
    return Documents(ids, marks, ends, url, np.asarray(labels[:]).tolist() if labelled and labels is not None else None)


def _ends(url: str, tokens: Any, lengths: Any) -> Ids:
    if lengths is None:
        each = np.full(tokens.shape[0], tokens.shape[1]) if tokens.ndim == 2 else np.array(tokens.shape)
    else:
        each = np.asarray(lengths[:]).astype(np.int64)
        wide = tokens.shape[1] if tokens.ndim == 2 else 0
        fits = each.max(initial=0) <= wide and len(each) == tokens.shape[0] if wide else each.sum() == tokens.shape[0]
        if each.ndim != 1 or not fits or each.min(initial=0) < 0:
            raise InputError(f"{url}: lengths do not fit tokens of shape {tokens.shape}")
    if not each.sum():
        raise InputError(f"{url} holds no token: there is nothing to attribute; check the path")
    return np.concatenate([[0], np.cumsum(each)]).astype(np.int64)
