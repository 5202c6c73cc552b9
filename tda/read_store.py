"""What readers of arrays see of a store: chunks that do not unpack beyond all measure, with the sums of what was read where asked."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from zarr.abc.store import Store
from zarr.storage import WrapperStore

from tda.errors import InputError

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

#: Bytes of a chunk, or of a whole array of one dimension, beyond which it is not ours: those written here are a few MiB, a few hundred
#: at most.
LARGEST = 2**32

_ZSTD = b"\x28\xb5\x2f\xfd"
#: Bytes of the content's size in a frame's header, by its first two bits; 0: one byte where the frame is a single segment, else none.
_SIZE_BYTES = (0, 2, 4, 8)


class ReadStore(WrapperStore[Store]):
    """A store whose chunks are looked at before they are unpacked.

    Args:
        store: what is read.
        sums: is given bytes and SHA-256 of every object that is read whole, by its name.
    """

    def __init__(self, store: Store, sums: dict[str, list[Any]] | None = None) -> None:
        super().__init__(store)
        self._sums = sums

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes of an object; InputError where it is a chunk that says that it unpacks to more than LARGEST."""
        found = await super().get(key, prototype, byte_range)
        if found is None or byte_range is not None:
            return found
        data = found.as_numpy_array().data
        if "c/" in key:
            check_unpacked(bytes(data[:18]), key)
        if self._sums is not None:
            self._sums[key] = [len(found), hashlib.sha256(data).hexdigest()]
        return found


def check_unpacked(head: bytes, where: str) -> None:
    """Look at the first 18 bytes of a chunk; those that are no Zstandard frame are left to their codec.

    Raises:
        InputError: the frame says that it unpacks to more than LARGEST, or does not say to how much, as those of ours do.
    """
    if head[:4] != _ZSTD or len(head) < 6:
        return
    size = unpacked(head)
    if size is None or size > LARGEST:
        says = "does not say to how many bytes it unpacks" if size is None else f"says that it unpacks to {size:,} bytes"
        raise InputError(f"chunk {where} {says}; it was not written by tda, or is damaged, and is not unpacked")


def unpacked(head: bytes) -> int | None:
    """The content size in the header of a Zstandard frame (RFC 8878, 3.1.1.1); None where it has none."""
    descriptor = head[4]
    single, width = bool(descriptor & 0x20), _SIZE_BYTES[descriptor >> 6]
    if width == 0 and not single:
        return None
    start = 5 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(head[start : start + (width or 1)], "little")
    return size + 256 if width == 2 else size
