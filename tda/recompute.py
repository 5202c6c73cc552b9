"""Activation checkpointing: what a model's repeated layers compute inside is not kept for the backward pass, but computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that stand in a list of several, as a transformer's layers do; each once, also where it is used again."""
    found: dict[nn.Module, None] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():  # from the outside in
        if isinstance(module, nn.ModuleList) and len(module) > 1 and module not in inside:
            for layer in module:
                found[layer] = None
                inside |= set(layer.modules())
    return list(found)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Within it, forward passes keep of every repeated layer its inputs alone; a backward pass later computes the rest again."""
    layers = repeated_layers(model)
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if cached:  # transformers: keys and values that are put away for the next token would be put away twice
        config.use_cache = False
    own = {layer: layer.__dict__["forward"] for layer in layers if "forward" in layer.__dict__}  # put there by somebody else
    try:
        for layer in layers:
            made: Any = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            layer.forward = made
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
            if layer in own:
                layer.__dict__["forward"] = own[layer]
        if cached:
            config.use_cache = True
