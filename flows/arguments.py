"""The arguments that commands share, and how commands speak of configurations and places."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

DEFAULT_STORE = "file:./store"

Config = Annotated[str, typer.Argument(help="The run's TOML file.", metavar="CONFIG")]
OtherStore = Annotated[str | None, typer.Option("--store", help="Store results here instead.", metavar="URL")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the file.", metavar="KEY=VALUE")]
Store = Annotated[str, typer.Option(envvar="TDA_STORE", help="Where runs are stored: a folder or s3://bucket/prefix.", metavar="URL")]
RunId = Annotated[str, typer.Argument(help='A run id, a beginning of one that is unique, or "latest".', metavar="RUN")]


def same(command: str, config: str, store: str | None, overrides: list[str] | None) -> str:
    """The command line that does the same again."""
    words = ["tda", command, config, *(["--store", store] if store else [])]
    return shlex.join([*words, *(word for each in overrides or [] for word in ("--set", each))])


def readable(url: str) -> str:
    """A path where there is one: it can be clicked or pasted."""
    return url.removeprefix("file://")
