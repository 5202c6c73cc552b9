"""Matrix products at the precision that a run asks for, on the fastest kernels that keep it.

On some CPUs oneDNN multiplies float32 about twice as fast as the default library, at full float32 accuracy, when it is allowed to use
bfloat16; on others it then really rounds to bfloat16. So the accuracy is measured once per process before it is relied on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Products = Literal["full", "bfloat16"]


@cache
def onednn_keeps_float32() -> bool:
    """Whether float32 products sent to oneDNN are as accurate as float32 (relative error of a fixed product below 2e-6)."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    truth = a.double() @ b.double().T
    with _matmul_precision("bf16"):
        error = float(((a @ b.T).double() - truth).norm() / truth.norm())
    return error < 2e-6


@contextmanager
def _matmul_precision(value: str) -> Iterator[None]:
    settings: Any = torch.backends.mkldnn
    before = settings.matmul.fp32_precision
    settings.matmul.fp32_precision = value
    try:
        yield
    finally:
        settings.matmul.fp32_precision = before


@contextmanager
def fast_float32() -> Iterator[None]:
    """Within it, float32 products run on oneDNN where that is measured to keep their accuracy."""
    if onednn_keeps_float32():
        with _matmul_precision("bf16"):
            yield
    else:
        yield


@contextmanager
def plain_float32() -> Iterator[None]:
    """Within it, float32 products run on the default kernels: what is slow on oneDNN leaves `fast_float32` so."""
    with _matmul_precision("ieee"):
        yield


def matmul(a: Tensor, b: Tensor, products: Products = "full") -> Tensor:
    """a @ b; with "bfloat16" the factors are rounded to bfloat16, and the sums are accumulated in float32. Returns a's dtype.

    A factor that is bfloat16 already is taken as it is.
    """
    if products == "full":
        return a @ b
    return (a.bfloat16() @ b.bfloat16()).to(torch.float32 if a.dtype == torch.bfloat16 else a.dtype)
