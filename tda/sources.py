"""The user's own source code behind a module: its file and those that it imports, for digests and against stale imports."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from tda.errors import InputError

#: What this process had imported when it was first seen here: the module's spec, which a reload replaces, and the digest of its source.
_IMPORTED: dict[str, tuple[ModuleSpec | None, str]] = {}


def sources(module: ModuleType) -> dict[str, bytes]:
    """The source of a module, under the name "", and of every module of the user's that it imports, directly or not, by name.

    Imports are read from the source, so that those inside functions count. The standard library, installed packages and tda itself
    (but for tda.problems) do not: versions stand for them. What is imported by a computed name is not seen.
    """
    found: dict[str, bytes] = {}
    waiting = [("", module.__name__, _source_file(module.__name__))]
    while waiting:
        name, actual, file = waiting.pop()
        if file is None or name in found:
            continue
        found[name] = file.read_bytes()
        package = actual if file.name == "__init__.py" else actual.rpartition(".")[0]
        for imported in _imports(found[name], package):
            waiting += [(imported, imported, _own_file(imported))] if imported != module.__name__ else []
    return found


def check_current(module: ModuleType) -> None:
    """Raise InputError where a source that a process of long life has imported was edited since: it would compute with the old one."""
    for name, text in sources(module).items():
        loaded = module if name == "" else sys.modules.get(name)
        if loaded is None:
            continue
        spec, digest = loaded.__spec__, hashlib.sha256(text).hexdigest()
        known = _IMPORTED.get(loaded.__name__)
        if known is None or known[0] is not spec:
            _IMPORTED[loaded.__name__] = (spec, digest)
        elif known[1] != digest:
            raise InputError(
                f"{loaded.__file__} was edited after this process had imported it; restart the process (a cluster's workers too)"
            )


def _imports(text: bytes, package: str) -> Iterator[str]:
    """Absolute names of what a source imports, packages before what is in them; a name taken out of a module may be a module."""
    for node in ast.walk(_parsed(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            if base:
                yield from _with_parents(base)
                yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*" and _own_file(base))


def _parsed(text: bytes) -> ast.AST:
    """CPython 3.11 counts how deep its parser is for all threads together, and may stumble where two parse at once."""
    try:
        return ast.parse(text)
    except SystemError:
        return ast.parse(text)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    yield from (".".join(parts[: i + 1]) for i in range(len(parts)))


def _own_file(name: str) -> Path | None:
    """The source file of a module of the user's; None for any other module and for what is no module."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or (top == "tda" and not f"{name}.".startswith("tda.problems.")):
        return None
    file = _source_file(name)
    installed = file is not None and (
        bool({"site-packages", "dist-packages"} & set(file.parts)) or file.is_relative_to(sysconfig.get_path("stdlib"))
    )
    return None if installed else file


def _source_file(name: str) -> Path | None:
    loaded = sys.modules.get(name)
    try:
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return None
    return Path(spec.origin) if spec is not None and spec.origin and spec.origin.endswith(".py") else None
