"""Named tensors as one safetensors object: written whole, read whole or by name (only the bytes of those names are fetched)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

import torch
from safetensors.torch import load, save
from torch import Tensor

from infra import storage
from tda import location

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}


def write_tensors(url: str, tensors: dict[str, Tensor]) -> None:
    """Write named tensors as one object: it is there whole or not at all."""
    storage.write_bytes(url, packed(tensors))


def packed(tensors: dict[str, Tensor]) -> bytes:
    """Named tensors as the bytes of one object."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        # The format refuses tensors that share memory, as two methods' directions may.
        found[name] = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(plain.untyped_storage().data_ptr())
    return save(found)


def read_tensors(url: str, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The tensors of an object; with `wanted`, only those whose name it accepts, fetched by their byte ranges."""
    if wanted is None:
        return load(location.read_bytes(url))
    (length,) = struct.unpack("<Q", location.read_range(url, 0, 8))
    header = json.loads(location.read_range(url, 8, 8 + length))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__" and wanted(name):
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            data = bytearray(location.read_range(url, start, stop))
            flat = torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]) if data else torch.empty(0, dtype=_DTYPES[entry["dtype"]])
            found[name] = flat.reshape(entry["shape"])
    return found
