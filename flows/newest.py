"""The newest checkpoint: what a pattern or a pointer file stands for at the moment a run begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.listing import matching
from tda import location
from tda.errors import InputError

if TYPE_CHECKING:
    from flows.config import RunConfig

#: How a file that names the checkpoint is recognised.
POINTER = ".pointer"
LONGEST_POINTER = 4096  # bytes; more is no path


def is_floating(checkpoint: str | None) -> bool:
    """Whether a checkpoint's URL is a pattern or a pointer, which may mean another file tomorrow."""
    return checkpoint is not None and ("*" in checkpoint or checkpoint.endswith(POINTER))


def pinned(config: RunConfig) -> RunConfig:
    """The configuration with the one file, or folder, that its checkpoint means now.

    Raises:
        InputError: the pattern matches nothing, or the pointer is not there or names nothing.
        StoreError: the place cannot be listed.
    """
    checkpoint = config.checkpoint
    if checkpoint is None or not is_floating(checkpoint):
        return config
    return config.model_copy(update={"checkpoint": newest(checkpoint)})


def newest(checkpoint: str) -> str:
    """What a pattern or a pointer, as an absolute URL, means now: the match that was written last, of those at one moment the last by name.

    Raises:
        InputError, StoreError: as `pinned`.
    """
    return _named_by(checkpoint) if checkpoint.endswith(POINTER) else _matched(checkpoint)


def _matched(pattern: str) -> str:
    found = matching(pattern)
    if not found:
        raise InputError(f'checkpoint = "{pattern}" matches nothing; correct the pattern, or wait for the first checkpoint')
    return max(found, key=lambda each: (each.modified, each.url)).url


def _named_by(pointer: str) -> str:
    try:
        data = location.read_bytes(pointer)
    except FileNotFoundError as error:
        raise InputError(f'checkpoint = "{pointer}": there is no such file; write the path of the checkpoint into it') from error
    try:
        path = data[: LONGEST_POINTER + 1].decode().strip()
    except UnicodeDecodeError:
        path = ""
    if not path or "\n" in path or len(data) > LONGEST_POINTER:
        raise InputError(f'checkpoint = "{pointer}" must hold one line, the path or URL of a checkpoint; write just that into it')
    folder = pointer.rpartition("/")[0]
    if folder.startswith("s3://") and ":" not in path:
        return location.resolve(path if path.startswith("s3://") else f"{folder}/{path}")
    return location.resolve(path, folder.removeprefix("file://"))
