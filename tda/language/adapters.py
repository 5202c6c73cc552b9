"""PEFT adapters on a base model: their parameters alone require gradients, and so are what is attributed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

from tda.checkpoint import listed
from tda.errors import InputError, cause

WEIGHTS = "adapter_model.safetensors"
#: What PEFT puts before, into and behind the names of a base's parameters.
PREFIX = "base_model.model."
INNER = (".base_layer.", ".original_module.")
SAVED = ".modules_to_save.default."


def is_adapter(state: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint holds an adapter's parameters without those of a base."""
    return bool(state) and all(name.startswith(PREFIX) and not any(inner in name for inner in INNER) for name in state)


def add_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapter of a folder, whose parameters alone require gradients.

    Raises InputError where the folder holds no adapter in safetensors, or one of another base: names are listed.
    """
    try:
        import peft
        from peft.utils import set_peft_model_state_dict
    except ImportError as error:
        raise InputError(f"adapter {folder} needs peft; pip install 'tda[adapters]'") from error
    for name in ("adapter_config.json", WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"adapter {folder} has no {name}; give a folder as PEFT's save_pretrained writes it (pickles are never read)")
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(folder), local_files_only=True)
        config.inference_mode = False
        # Its own random start is replaced below; torch's generator stays where it was.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in an older way than they now have
            wrapped: Any = peft.get_peft_model(model, config)
        told = set_peft_model_state_dict(wrapped, load((folder / WEIGHTS).read_bytes()))
    except Exception as error:
        raise InputError(
            f"adapter {folder} does not fit the base {type(model).__name__}: {cause(error)}; give the base that it was made for"
        ) from error
    own = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    missing, unknown = [name for name in told.missing_keys if name in own], list(told.unexpected_keys)
    if missing or unknown:
        said = "; ".join(f"{what}: {listed(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names)
        raise InputError(f"adapter {folder} does not fit the base {type(model).__name__}: {said}; give the base that it was made for")
    result: nn.Module = wrapped.eval()
    return result


def base_names(model: nn.Module, base: Iterable[str]) -> dict[str, str]:
    """Names, in a model with an adapter, of the tensors `base` of its base alone; those that the adapter holds copies of are the base's."""
    found = {}
    for name in model.state_dict():
        plain = name.removeprefix(PREFIX)
        for inner in INNER:
            plain = plain.replace(inner, ".")
        if SAVED not in name:
            found[plain] = name
    return {name: found[name] for name in base if name in found}


def replaced_names(model: nn.Module) -> frozenset[str]:
    """Names, in the base, of what the adapter replaces as a whole, such as a new head: a base may lack them."""
    return frozenset(name.removeprefix(PREFIX).replace(SAVED, ".") for name in model.state_dict() if SAVED in name)
