"""Records of text files: JSON lines, Parquet, and folders that the `datasets` library saved; from a disk or object storage."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from tda import location
from tda.errors import InputError, cause

Record = dict[str, Any]


def records(url: str) -> Iterator[tuple[str, Record]]:
    """Each record of a file or folder, with its place in it for people ("line 3", "row 3", both counted from 1).

    url: *.jsonl; *.parquet; or a folder of `Dataset.save_to_disk`. Raises InputError where there is nothing, or nothing of that kind.
    """
    where = location.resolve(url)
    try:
        if where.endswith(".jsonl"):
            yield from _lines(where)
        elif where.endswith(".parquet"):
            yield from _rows(_parquet(where))
        else:
            yield from _rows(_saved(where))
    except FileNotFoundError as error:
        raise InputError(f"data {where} do not exist; correct the path") from error


def _lines(url: str) -> Iterator[tuple[str, Record]]:
    for n, line in enumerate(location.read_bytes(url).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{url}, line {n} is not JSON ({cause(error)}); every line must be one object") from error
        if not isinstance(record, dict):
            raise InputError(f'{url}, line {n} is a JSON {type(record).__name__}; write an object such as {{"text": "..."}}')
        yield f"line {n}", record


def _rows(tables: Iterator[Any]) -> Iterator[tuple[str, Record]]:
    n = 0
    for batch in tables:
        for record in batch.to_pylist():
            n += 1
            yield f"row {n}", record


def _parquet(url: str) -> Iterator[Any]:
    _need_pyarrow(url)
    import pyarrow as pa
    from pyarrow import parquet

    try:
        yield from parquet.ParquetFile(io.BytesIO(location.read_bytes(url))).iter_batches()
    except pa.ArrowException as error:
        raise InputError(f"{url} is not a whole Parquet file ({cause(error)}); write it again") from error


def _saved(url: str) -> Iterator[Any]:
    """Record batches of a folder that `Dataset.save_to_disk` wrote: Arrow streams, in the order of its state.json."""
    names = location.list_names(url)
    if "dataset_dict.json" in names:
        splits = [name for name in names if not name.endswith(".json")]
        raise InputError(f"{url} holds several datasets; name one of {', '.join(f'{url}/{name}' for name in splits)}")
    if "state.json" not in names:
        said = "is not a folder of datasets.Dataset.save_to_disk (it has no state.json)" if names else "does not exist"
        raise InputError(f"data {url}: {said}; give a .jsonl or .parquet file, such a folder, or a .zarr group with an array `tokens`")
    _need_pyarrow(url)
    import pyarrow as pa

    for file in location.read_json(location.join(url, "state.json"))["_data_files"]:
        data = location.read_bytes(location.join(url, file["filename"]))
        try:
            yield from pa.ipc.open_stream(io.BytesIO(data))
        except pa.ArrowException as error:
            raise InputError(f"{url}/{file['filename']} is not a whole Arrow stream ({cause(error)}); save the dataset again") from error


def _need_pyarrow(url: str) -> None:
    try:
        import pyarrow as pa  # noqa: F401
    except ImportError as error:
        raise InputError(f"reading {url} needs pyarrow; pip install 'tda[parquet]', or give the data as .jsonl") from error
