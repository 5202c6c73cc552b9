"""Named tensors come back as they were, whole or by name, and only what is asked for is fetched."""

from pathlib import Path

import pytest
import torch

from tasks.tensors import read_tensors, write_tensors
from tda import location

TENSORS = {
    "a/1": torch.arange(6, dtype=torch.float64).view(2, 3),
    "b": torch.randn(4, 5).T,
    "c": torch.randn(3).bfloat16(),
    "empty": torch.zeros(0, 2),
    "number": torch.tensor(7),
}


@pytest.mark.parametrize("wanted", [None, lambda _: True], ids=["whole", "by ranges"])
def test_tensors_come_back_bit_for_bit(tmp_path: Path, wanted) -> None:
    url = f"file://{tmp_path}/x.safetensors"
    write_tensors(url, TENSORS)
    found = read_tensors(url, wanted)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tensors_that_share_memory_are_each_stored(tmp_path: Path) -> None:
    one = torch.randn(2, 2)
    write_tensors(f"file://{tmp_path}/x", {"a": one, "b": one, "c": one[0]})
    found = read_tensors(f"file://{tmp_path}/x")
    assert torch.equal(found["a"], one)
    assert torch.equal(found["b"], one)
    assert torch.equal(found["c"], one[0])


def test_only_the_bytes_of_wanted_tensors_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/x"
    write_tensors(url, {"large": torch.zeros(100_000), "small": torch.ones(3)})
    fetched, read = [], location.read_range

    def counting(where: str, start: int, stop: int) -> bytes:
        fetched.append(stop - start)
        return read(where, start, stop)

    monkeypatch.setattr(location, "read_range", counting)
    assert read_tensors(url, lambda name: name == "small")["small"].tolist() == [1, 1, 1]
    assert sum(fetched) < 500


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/x"
    write_tensors(url, {"a": torch.ones(2)})
    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever the format raises for what it cannot hold)
        write_tensors(url, {"a": torch.ones(2, dtype=torch.complex32)})
    assert read_tensors(url)["a"].tolist() == [1, 1]
