"""Checkpoints: safetensors bytes in and out, checked against the model they are for."""

from __future__ import annotations

import hashlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tda.errors import InputError


def dump(model: nn.Module) -> bytes:
    """The model's state as safetensors bytes; tensors that share memory (tied weights) are stored once, under their first name."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or key not in seen:
            state[name] = tensor.detach().contiguous().cpu().clone()
            seen.add(key)
    return save(state)


def parse(data: bytes, where: str) -> dict[str, Tensor]:
    """Tensors by name; InputError where the bytes are not safetensors (nothing is ever unpickled) or hold NaN."""
    try:
        state = load(data)
    except SafetensorError as error:
        said = f"checkpoint {where} is not a whole safetensors file ({error})"
        raise InputError(f"{said}; copy it again, or save it with safetensors.torch.save_file") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"checkpoint {where}: {name} holds NaN or infinite weights; take one from before the training diverged")
    return state


def digest(state: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def fill(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load `state` into `model` in place; InputError names the tensors that are missing, unknown or of another shape.

    A tied tensor that is stored once counts for all its names.
    """
    own = model.state_dict()
    pointers = {tensor.data_ptr() for name, tensor in own.items() if name in state}
    missing = [name for name, tensor in own.items() if name not in state and tensor.data_ptr() not in pointers]
    unknown = [name for name in state if name not in own]
    shapes = [f"{n} {tuple(state[n].shape)} instead of {tuple(own[n].shape)}" for n in state if n in own and state[n].shape != own[n].shape]
    found = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
    if any(names for _, names in found):
        said = "; ".join(f"{what}: {_listed(names)}" for what, names in found if names)
        raise InputError(f"checkpoint {where} does not fit the model: {said}; give the checkpoint of this architecture")
    model.load_state_dict(state, strict=False)


def _listed(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
