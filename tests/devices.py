"""The devices that numerical tests run on: one on paper (`tests.elsewhere`) everywhere, a GPU where torch can use one (`make test-gpu`).

What two devices may differ by is said here, and nowhere else.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.elsewhere import PAPER, Elsewhere

DEVICES = [
    "paper",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch can use no GPU")]),
]

#: Largest difference to the processor's numbers, as a share of the largest of them. On paper the kernels are the processor's own; but for
#: a few that are written for it alone, numbers are the same bit for bit. TF32 is off; shorter products are held to ranks (SPEARMAN).
TOLERANCES = {
    ("paper", torch.float64): 1e-12,
    ("paper", torch.float32): 1e-5,
    ("cuda", torch.float64): 1e-9,
    ("cuda", torch.float32): 1e-3,
}
#: Rank correlation of scores with products or layers in bfloat16 or float16 with those in float32.
SPEARMAN = 0.999


@contextmanager
def working_on(name: str) -> Iterator[torch.device]:
    """A device by the name of its parameter, ready to be used in the block."""
    if name != "paper":
        yield torch.device(name)
        return
    with Elsewhere():
        yield PAPER


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, as a share of the largest entry; both are brought home."""
    found, wanted = found.cpu().double(), wanted.cpu().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))
