"""Sentence embeddings by any local encoder of transformers, and who is nearest by them.

A folder is what sentence-transformers saves (modules.json names its parts: a transformer, a pooling, perhaps a normalisation), or a plain
encoder of transformers, whose last hidden states are averaged over the tokens. Nothing is downloaded, no code of a folder is run.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tda import checkpoint
from tda.errors import InputError, cause
from tda.language import folders
from tda.products import fast_float32

#: Documents that are compared with the queries at once: memory does not grow with their number.
BLOCK = 16384
#: MiB of distances at a time, beside which the choice of the nearest holds some four times as much: nor does it grow with the queries.
WORKING_MIB = 32
#: Files of a folder by which an encoder's numbers are determined.
_CONTENT = (".json", ".txt", ".safetensors", ".model")


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    real = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * real).sum(1) / real.sum(1).clamp(min=1)


def _first(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), mask.long().argmax(1)]


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden)), mask.shape[1] - 1 - mask.flip(1).long().argmax(1)]


def _largest(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden.masked_fill(~mask.bool().unsqueeze(-1), -torch.inf).amax(1)


#: How the hidden states (text, token, dim) become one vector each, by the names of old configurations and of new ones.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pooling_mode_mean_tokens": _mean,
    "pooling_mode_cls_token": _first,
    "pooling_mode_max_tokens": _largest,
    "pooling_mode_lasttoken": _last,
}
_SHORT = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}


@dataclass(frozen=True)
class Encoder:
    """A model that turns texts into vectors. limit: the most tokens of a text, longer ones are cut; None: no limit."""

    model: nn.Module
    tokenizer: Any
    pool: Callable[[Tensor, Tensor], Tensor]
    limit: int | None
    lower: bool

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, cut at the limit."""
        given = [text.lower() for text in texts] if self.lower else list(texts)
        cut = {"truncation": True, "max_length": self.limit} if self.limit else {}
        found: list[list[int]] = self.tokenizer(given, **cut)["input_ids"]
        return found


def embed(texts: Sequence[str], folder: str | Path, batch_size: int = 64) -> np.ndarray[Any, Any]:
    """Embeddings (text, dim), float32, of unit length.

    folder: of the encoder. Texts beyond its limit (max_seq_length, or its positions) are cut, as encoders do.

    Raises:
        InputError: the folder holds no such encoder, or a text has no token or no finite embedding.
    """
    encoder = open_encoder(str(folder))
    tokens = encoder.tokens(texts)
    empty = next((t for t, ids in enumerate(tokens) if not ids), None)
    if empty is not None:
        raise InputError(f"text {empty} ({texts[empty][:40]!r}) has no token, so it has no embedding")
    order = sorted(range(len(tokens)), key=lambda t: len(tokens[t]))  # little padding
    found: list[np.ndarray[Any, Any]] = [np.zeros(0)] * len(tokens)
    with torch.no_grad(), fast_float32():
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            for t, vector in zip(part, _vectors(encoder, [tokens[t] for t in part]), strict=True):
                found[t] = vector
    wrong = next((t for t, vector in enumerate(found) if not np.isfinite(vector).all()), None)
    if wrong is not None:
        raise InputError(f"encoder {folder}: the embedding of text {wrong} ({texts[wrong][:40]!r}) is zero or not finite")
    return np.stack(found) if found else np.zeros((0, 0), dtype=np.float32)


def _vectors(encoder: Encoder, tokens: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    width = max(map(len, tokens))
    pad = encoder.tokenizer.pad_token_id or 0
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in tokens])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens])
    vectors = encoder.pool(encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state.float(), mask)
    found: np.ndarray[Any, Any] = (vectors / vectors.norm(dim=1, keepdim=True)).numpy()
    return found


def nearest(queries: np.ndarray[Any, Any], documents: np.ndarray[Any, Any], k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The k documents with the largest cosine to each query: ids (query, k) int64, cosines (query, k) float32, the largest first.

    queries (query, dim), documents (document, dim): an array of Zarr will do, it is read BLOCK rows at a time, so that memory does not
    grow with it. Documents of one cosine, as float32 has it, come by id, also at the last places. k: at most the number of documents.
    """
    from sklearn.metrics import pairwise_distances_chunked

    ids = np.zeros((len(queries), 0), dtype=np.int64)
    cosines = np.zeros((len(queries), 0), dtype=np.float32)
    for start in range(0, documents.shape[0], BLOCK):
        # In float64 the same document twice has the same cosine twice, wherever a matrix product meets it.
        block = np.asarray(documents[start : start + BLOCK], dtype=np.float64)
        asked = np.asarray(queries, dtype=np.float64)
        parts = pairwise_distances_chunked(asked, block, reduce_func=partial(_best, k=k), metric="cosine", working_memory=WORKING_MIB)
        place, cosine = (np.concatenate(each) for each in zip(*parts, strict=True))
        ids, cosines = np.concatenate([ids, place + start], 1), np.concatenate([cosines, cosine], 1)
        order = np.lexsort((ids, -cosines), axis=1)[:, :k]
        ids, cosines = np.take_along_axis(ids, order, 1), np.take_along_axis(cosines, order, 1)
    return ids, cosines


def _best(distances: np.ndarray[Any, Any], _start: int, *, k: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of distances (query, document), 1 - cosine: the places and the cosines of the k nearest of each query, in the order of places."""
    cosines = (1 - distances).astype(np.float32)
    count = min(k, cosines.shape[1])
    last = np.partition(cosines, -count, axis=1)[:, -count, None]
    above, level = cosines > last, cosines == last
    # Of those that tie for the last places, the first ones.
    taken = above | (level & (level.cumsum(1) <= count - above.sum(1, keepdims=True)))
    place = np.nonzero(taken)[1].reshape(len(cosines), count)
    return place, np.take_along_axis(cosines, place, 1)


@lru_cache(maxsize=1)
def _opened(folder: str, content: str) -> Encoder:  # noqa: ARG001  (a folder that was edited is another)
    path = Path(folder)
    base, pool = _parts(path)
    config = folders.read_config(base)
    tokenizer = folders.read_tokenizer(base)
    folders.check_vocabulary(tokenizer, config, base)
    own = _json(base / "sentence_bert_config.json")
    limits = [own.get("max_seq_length"), folders.positions(config), tokenizer.model_max_length]
    limit = min((int(each) for each in limits if each and each < 1e9), default=None)  # transformers write 1e30 where there is none
    return Encoder(_model(base, config), tokenizer, pool, limit, bool(own.get("do_lower_case")))


def open_encoder(folder: str) -> Encoder:
    """The encoder of a local folder; kept until another is opened.

    Raises:
        InputError: the folder holds none, or parts that are not known.
    """
    path = folders.local(folder, "encoder")
    return _opened(str(path), encoder_digest(str(path)))


def encoder_digest(folder: str) -> str:
    """sha256 of the files of an encoder's folder that determine its embeddings."""
    path, total = folders.local(folder, "encoder"), hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.suffix in _CONTENT:
            with file.open("rb") as stream:
                total.update(f"{file.relative_to(path)}\0".encode() + hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _parts(folder: Path) -> tuple[Path, Callable[[Tensor, Tensor], Tensor]]:
    """Where the transformer lies, and the pooling, as modules.json says it; without one, the folder itself and the mean."""
    if not (folder / "modules.json").is_file():
        return folder, _mean
    base, pool = folder, POOLINGS["pooling_mode_mean_tokens"]
    for module in _json(folder / "modules.json"):
        kind, place = str(module.get("type", "")).rpartition(".")[2], folder / str(module.get("path", ""))
        if kind == "Transformer":
            base = place
        elif kind == "Pooling":
            pool = _pooling(place / "config.json")
        elif kind != "Normalize":  # all embeddings are made of unit length
            raise InputError(f"encoder {folder}: modules.json names a part {kind!r}; known are Transformer, Pooling and Normalize")
    return base, pool


def _pooling(file: Path) -> Callable[[Tensor, Tensor], Tensor]:
    options = _json(file)
    asked = [name for name, value in options.items() if name.startswith("pooling_mode_") and value is True]
    if isinstance(options.get("pooling_mode"), str):
        asked = [f"pooling_mode_{_SHORT.get(options['pooling_mode'], options['pooling_mode'])}"]
    if len(asked) != 1 or asked[0] not in POOLINGS:
        raise InputError(
            f"encoder {file.parents[1]}: {file} asks for {', '.join(asked) or 'no pooling'}; known is one of {', '.join(POOLINGS)}"
        )
    return POOLINGS[asked[0]]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, OSError) as error:
        raise InputError(f"encoder: {file} cannot be read: {cause(error)}") from error


def _model(folder: Path, config: Any) -> nn.Module:
    """The encoder with the folder's weights; a pooler, which is not used, and heads may be absent or too many."""
    state = checkpoint.read(f"file://{folder.absolute()}")
    with torch.device("meta"):
        kind: Any = type(folders.fresh("AutoModel", config))
    with folders.quiet():
        try:
            model, told = kind.from_pretrained(
                None, config=copy.deepcopy(config), state_dict=state, output_loading_info=True, dtype=torch.float32,
                attn_implementation="eager",
            )  # fmt: skip
        except Exception as error:
            raise InputError(f"encoder {folder} cannot be loaded as {kind.__name__}: {cause(error)}") from error
    missing = sorted(name for name in told["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise InputError(f"encoder {folder} lacks weights of its {kind.__name__}: {checkpoint.listed(missing)}; copy the folder again")
    found: nn.Module = model.eval()
    return found
