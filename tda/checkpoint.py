"""Checkpoints: safetensors bytes in and out, checked against the model they are for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from tda import location
from tda.errors import InputError

#: Endings of files that are pickles, and what a folder of transformers calls its weights.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


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


def read(url: str) -> dict[str, Tensor]:
    """Tensors by name of a safetensors file, or of a folder as transformers save it, in one file or in several with an index.

    Raises InputError where there is none, or only pickles.
    """
    if url.endswith(PICKLES):
        raise InputError(f"checkpoint {url} is a pickle, which is never read; save it with safetensors.torch.save_file")
    names = [] if url.endswith(".safetensors") else location.list_names(url)
    if not names:
        return _file(url, url)
    if INDEX in names:
        return _shards(url, location.read_json(location.join(url, INDEX)).get("weight_map", {}))
    if WHOLE in names:
        return _file(location.join(url, WHOLE), url)
    raise InputError(f"checkpoint {url} {_without_weights(names)}")


def has_weights(names: Sequence[str]) -> bool:
    """Whether a folder that holds files of these names has weights that `read` reads."""
    return INDEX in names or WHOLE in names


def _file(url: str, where: str) -> dict[str, Tensor]:
    try:
        return parse(location.read_bytes(url), where)
    except FileNotFoundError as error:
        raise InputError(f"checkpoint {where} does not exist; correct the path, or leave it out to train one") from error


def _shards(url: str, places: dict[str, str]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        try:
            state |= parse(location.read_bytes(location.join(url, name)), location.join(url, name))
        except FileNotFoundError as error:
            raise InputError(f"checkpoint {url} lacks {name}, which its index names; copy the folder again") from error
    if lost := sorted(places.keys() - state.keys()):
        raise InputError(f"checkpoint {url} lacks tensors that its index names: {listed(lost)}; copy the folder again")
    return state


def _without_weights(names: Sequence[str]) -> str:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if "adapter_config.json" in names:
        return "is a PEFT adapter without its base; give the base's folder here, and the adapter's in [problem_options]"
    if pickles:
        return (
            f"holds pickled weights ({listed(pickles)}), which are never read; where you trust them, convert them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"holds no {WHOLE}; it has {listed(names)}: give a safetensors file, or a folder of transformers"


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
        said = "; ".join(f"{what}: {listed(names)}" for what, names in found if names)
        raise InputError(f"checkpoint {where} does not fit the model: {said}; give the checkpoint of this architecture")
    model.load_state_dict(state, strict=False)


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
