"""Methods of a run share the room of the temporary file."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tasks import spool
from tasks.directions import Directions
from tda.blocks import Block
from tda.device import CPU
from tda.directions import Factored
from tda.spooled import Spooled


@pytest.mark.parametrize(("methods", "rank"), [(1, None), (2, 10)])
def test_terms_become_matrices_where_those_of_all_methods_have_room(
    monkeypatch: pytest.MonkeyPatch, methods: int, rank: int | None
) -> None:
    block = Block("layer", "linear", "linear", "kronecker", 1, 30, 40, "weight", None, ((30, 40),), positions=64)
    one = Factored(torch.randn(5, 9, 1, 30), torch.randn(5, 9, 1, 40))
    monkeypatch.setattr(spool, "HELD_BYTES", 0)
    monkeypatch.setattr(spool, "SPOOL_BYTES", 5 * 1200 * 4)  # the matrices of one method
    monkeypatch.setattr(spool, "read_parts", lambda *_: iter([Directions([[one]], torch.zeros(5), torch.ones(5))]))
    job: Any = SimpleNamespace(parsed=lambda: SimpleNamespace(passes=1, rank=10))
    attributed: Any = SimpleNamespace(blocks=(block,), dtype=torch.float32, device=CPU)
    ((found,),) = spool.asked(job, range(5), attributed, methods).passes
    assert isinstance(found, Spooled)
    assert found.rank == rank
