"""The S3 file system that reads and Zarr chunks go through: s3fs, with every request tried again where that may help.

Neither s3fs nor botocore tries anything again themselves here (both would, each in its own way, and not everything): tda.patience alone
says what is tried again and how long is waited. A body that is shorter than announced, or of another MD5 than its ETag, is read again.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from s3fs import S3FileSystem
from tenacity import AsyncRetrying

from tda.patience import Truncated, number, patience

_MD5 = re.compile(r'"?([0-9a-f]{32})"?')


class PatientS3(S3FileSystem):  # type: ignore[misc]  # s3fs is untyped
    """S3 with patience; otherwise s3fs."""

    retries = 1  # s3fs's own loop runs once

    async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:
        return await AsyncRetrying(**patience())(super()._call_s3, method, *arguments, **options)

    async def _cat_file(
        self, path: str, version_id: str | None = None, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        """The bytes of an object, or of a part of it, in one request."""
        bucket, key, version = self.split_path(path)
        asked = {"Bucket": bucket, "Key": key}
        if version_id or version:
            asked["VersionId"] = version_id or version
        if start is not None or end is not None:
            asked["Range"] = await self._process_limits(path, start, end)
        return await AsyncRetrying(**patience())(self._read, asked)

    async def _read(self, asked: dict[str, str]) -> bytes:
        answer = await super()._call_s3("get_object", **asked)
        async with answer["Body"] as body:
            data = bytes(await body.read())
        # Zarr reads asynchronously; its chunks carry checksums of their own, and the MD5 of all of them would take time.
        _check_whole(answer, data, "/".join((asked["Bucket"], asked["Key"])), etag=not self.asynchronous)
        return data


def options() -> dict[str, Any]:
    """How PatientS3 is opened.

    Listings are not cached: another process adds runs while this one is open. Objects are chunks of a few MiB: one request each, where
    s3fs would first ask for the length to split a large one.
    """
    config = {
        "connect_timeout": number("TDA_CONNECT_TIMEOUT", 10.0),
        "read_timeout": number("TDA_STORAGE_TIMEOUT", 60.0),
        "retries": {"total_max_attempts": 1},
    }
    return {"use_listings_cache": False, "max_concurrency": 1, "config_kwargs": config}


def _check_whole(answer: dict[str, Any], data: bytes, where: str, *, etag: bool) -> None:
    """Truncated where the bytes are not those that the server announced; etag: whether also by their MD5."""
    announced = answer.get("ContentLength")
    if announced is not None and announced != len(data):
        raise Truncated(f"{where}: {len(data)} bytes came of {announced}")
    part = re.fullmatch(r"bytes (\d+)-(\d+)/.*", str(answer.get("ContentRange", "")))
    if part:
        if int(part[2]) + 1 - int(part[1]) != len(data):
            raise Truncated(f"{where}: {len(data)} bytes came of {int(part[2]) + 1 - int(part[1])}")
        return
    # The ETag of an object of one PUT is the MD5 of its bytes, unless the server encrypts by a key of its customer's.
    stored = _MD5.fullmatch(str(answer.get("ETag", "")))
    plain = answer.get("ServerSideEncryption") in (None, "AES256") and not answer.get("SSECustomerAlgorithm")
    if etag and stored and plain and hashlib.md5(data, usedforsecurity=False).hexdigest() != stored[1]:
        raise Truncated(f"{where}: the {len(data)} bytes that came are not those that were stored")
