"""Where a model and its batches lie: the processor, or a GPU that torch can use.

Numbers that are drawn at random are drawn by the processor and moved, so that they are the same on every device: a Fisher's labels, the
noise and the batches of chains, orders of training, projections, the start of an iteration. What is left between two devices is the
rounding of float32 or float64: their kernels add in other orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

Device = Literal["auto", "cpu", "cuda"]
T = TypeVar("T")

CPU = torch.device("cpu")


def device_here(asked: str) -> torch.device:
    """The device that is meant by "auto" or "cuda" in this process: its GPU where it has one, else the processor. Others are as named."""
    if asked in ("auto", "cuda"):
        return torch.device("cuda") if torch.cuda.is_available() else CPU
    return torch.device(asked)


def named(asked: str) -> str:
    """The device of this process, as people call it: "cpu", or the GPU's name."""
    device = device_here(asked)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights lie."""
    return next((parameter.device for parameter in model.parameters()), CPU)


def ready(device: torch.device) -> torch.device:
    """The same device. From here on this process computes float32 on it as float32, where torch allows TF32 and sums in half precision."""
    if device.type == "cuda":
        backends: Any = torch.backends
        for kernels in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
            kernels.fp32_precision = "ieee"
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return device


def placed(thing: T, device: torch.device) -> T:
    """The same with its tensors on a device: of dataclasses, lists, tuples and dictionaries of tensors; anything else stays as it is."""
    return thing if device == CPU and _is_home(thing) else _moved(thing, device)


def home(thing: T) -> T:
    """The same with its tensors on the processor, as what is stored has to be."""
    return placed(thing, CPU)


def _is_home(thing: Any) -> bool:
    return all(tensor.device == CPU for tensor in _tensors(thing))


def _tensors(thing: Any) -> list[Tensor]:
    if isinstance(thing, Tensor):
        return [thing]
    return [tensor for part in _parts(thing) for tensor in _tensors(part)]


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, Mapping):
        return list(thing.values())
    if isinstance(thing, list | tuple):
        return list(thing)
    return [getattr(thing, f.name) for f in fields(thing) if f.init] if _is_record(thing) else []


def _is_record(thing: Any) -> bool:
    return is_dataclass(thing) and not isinstance(thing, type)


def _moved(thing: Any, device: torch.device) -> Any:
    if isinstance(thing, Tensor):
        return thing.to(device)
    if isinstance(thing, dict):
        return {key: _moved(part, device) for key, part in thing.items()}
    if isinstance(thing, list | tuple):
        parts = [_moved(part, device) for part in thing]
        return type(thing)(*parts) if hasattr(thing, "_fields") else type(thing)(parts)
    if _is_record(thing) and _tensors(thing):
        return replace(thing, **{f.name: _moved(getattr(thing, f.name), device) for f in fields(thing) if f.init})
    return thing
