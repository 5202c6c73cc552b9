"""The parts of a transformer that have names in every architecture: which modules are its MLPs, and which its attention."""

from __future__ import annotations

import re

from torch import nn

#: By the name of a module inside a layer. BERT's MLP is `intermediate` and the layer's own `output`; its attention has an `output`, too.
PARTS = {
    "mlp": re.compile(r"(^|\.)(mlp|ffn|feed_forward|intermediate)(\.|$)|\.layer\.\d+\.output(\.|$)"),
    "attention": re.compile(r"(^|\.)(attn|attention|self_attn|self_attention|crossattention)(\.|$)"),
}


def groups(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Names of the modules with parameters of their own, by "mlp" and "attention"; norms belong to neither."""
    owners = [name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False)) and not _norm(module)]
    return {part: tuple(name for name in owners if pattern.search(name)) for part, pattern in PARTS.items()}


def _norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
