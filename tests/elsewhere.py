"""A device on paper: what lies there is real, computed by the processor, but torch is told that it lies elsewhere.

Within `Elsewhere()`, tensors asked for on the device PAPER ("meta", the one that every torch has) hold numbers, and every operation is
held to the rules of a real accelerator: tensors of two devices never meet, but for numbers without an axis and the ids of an index; and
what is there cannot become a NumPy array. So a computation that passes leaves nothing behind on the wrong device, and its numbers are the
processor's bit for bit.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PAPER = torch.device("meta")

aten = torch.ops.aten
#: Copies are what moves tensors between devices; ids of an index may lie on the processor.
_MOVES = {aten._to_copy, aten.copy_, aten.copy}
_INDEXED = {aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_, aten._unsafe_index}


class There(Tensor):
    """A tensor that says it lies on PAPER; `here` holds its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Self:
        if here._is_zerotensor():  # forward derivatives have zeros without memory, which only torch itself knows to read
            here = torch.zeros(here.shape, dtype=here.dtype)
        made = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=PAPER
        )
        made.here = here
        return made

    @property
    def data(self) -> Tensor:  # torch exchanges the data of a parameter without a word to its class
        return self.detach()

    @data.setter
    def data(self, other: "There") -> None:
        assert isinstance(other, There), "the data of a tensor cannot come from another device"
        self.here = other.here

    def tolist(self) -> Any:
        """Its numbers: a real device gives them, too."""
        return self.here.tolist()

    def data_ptr(self) -> int:
        """Where its numbers are."""
        return self.here.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        """No array: NumPy knows the processor's memory alone."""
        raise TypeError("can't convert a tensor that lies elsewhere to numpy; use Tensor.cpu() first")

    def __repr__(self) -> str:
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class Elsewhere(TorchDispatchMode):
    """While active, tensors can be made on PAPER, and moved there and back."""

    def __enter__(self) -> Self:
        self._swapped = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # else module.to would part tied parameters of this class
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        torch.__future__.set_swap_module_params_on_conversion(self._swapped)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = _tensors((args, kwargs))
    asked = kwargs.get("device")
    there = any(isinstance(t, There) for t in tensors)
    if func.overloadpacket in _MOVES:
        # A copy into a tensor lies where that tensor does.
        there = isinstance(args[0], There) if asked is None else torch.device(asked) == PAPER
    else:
        if there:
            _check(func, args, kwargs, tensors)
        there = there if asked is None else torch.device(asked) == PAPER
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    found = func(*_mapped(_here, args), **_mapped(_here, kwargs))
    if there and func.overloadpacket is aten.empty and found.dtype != torch.bool:
        # torch thinks that PAPER has no numbers to copy a Python list to (torch.tensor(list, device=...)): what reads them has to fail.
        found.fill_(torch.nan if found.is_floating_point() else torch.iinfo(found.dtype).max)
    known = {id(_here(t)): t for t in tensors}  # what is changed in place stays the tensor that it was
    return _mapped(lambda leaf: known[id(leaf)] if id(leaf) in known else There(leaf) if there else leaf, found)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: _mapped(function, part) for key, part in tree.items()}
    return type(tree)([_mapped(function, part) for part in tree]) if isinstance(tree, list | tuple) else tree


def _here(leaf: Tensor) -> Tensor:
    return leaf.here if isinstance(leaf, There) else leaf


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operation changes."""
    arguments = enumerate(func._schema.arguments)
    return tuple((place, a.name) for place, a in arguments if a.alias_info and a.alias_info.is_write)


def _check(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """What a real device refuses, of an operation one of whose tensors lies on PAPER."""
    here = [t for t in tensors if not isinstance(t, There)]
    if not here:
        return
    written = {id(t) for k, name in _written(func) for t in _tensors(args[k] if k < len(args) else kwargs.get(name))}
    ids = {id(t) for t in _tensors(args[1])} if func.overloadpacket in _INDEXED and isinstance(args[0], There) else set()
    wrong = [t for t in here if id(t) not in ids and (t.ndim > 0 or id(t) in written)]
    if wrong:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got one of shape {tuple(wrong[0].shape)} elsewhere")
