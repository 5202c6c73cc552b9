"""The attribution methods, by the name that a run's `[[methods]]` uses."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from tda.errors import InputError
from tda.methods.astra_source import AstraSource
from tda.methods.bif import Bif
from tda.methods.datainf import DataInf
from tda.methods.dtda import Dtda
from tda.methods.ekfac import EKFAC
from tda.methods.gradcos import GradCos
from tda.methods.graddot import GradDot
from tda.methods.iterative import CG, SNI, Astra
from tda.methods.kfac import KFAC
from tda.methods.method import Method
from tda.methods.random_scores import Random
from tda.methods.representation import Representation
from tda.methods.source import FastSource, Source
from tda.methods.spectral import GGN, BlockGGN, Hessian
from tda.methods.tracin import TracIn
from tda.methods.trak import Trak

METHODS: dict[str, type[Method]] = {
    "graddot": GradDot,
    "gradcos": GradCos,
    "kfac": KFAC,
    "ekfac": EKFAC,
    "hessian": Hessian,
    "ggn": GGN,
    "block_ggn": BlockGGN,
    "cg": CG,
    "sni": SNI,
    "astra": Astra,
    "source": Source,
    "fast_source": FastSource,
    "astra_source": AstraSource,
    "tracin": TracIn,
    "trak": Trak,
    "datainf": DataInf,
    "dtda": Dtda,
    "random": Random,
    "representation": Representation,
    "bif": Bif,
}


def parse(options: dict[str, Any]) -> Method:
    """The method that one `[[methods]]` table describes; InputError in one line names the key, the value and what would do."""
    name = options.get("name")
    if name is None:
        raise InputError(f'a [[methods]] table has no "name"; give one of {", ".join(METHODS)}')
    kind = METHODS.get(str(name))
    if kind is None:
        near = difflib.get_close_matches(str(name), METHODS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(METHODS)}"
        raise InputError(f"unknown method {name!r}; {hint}")
    unknown = [key for key in options if key not in kind.model_fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], kind.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(kind.model_fields)}"
        raise InputError(f"method {name!r}: unknown option {unknown[0]!r}; {hint}")
    try:
        return kind(**options)
    except ValidationError as error:
        first, *others = error.errors()
        where = ".".join(str(part) for part in first["loc"][:1])
        said = first["msg"].removeprefix("Value error, ")
        if len(first["loc"]) > 1:  # one of several kinds that an option may be
            kinds = [other["msg"].removeprefix("Input should be ") for other in others if other["loc"][:1] == first["loc"][:1]]
            said = " or ".join(dict.fromkeys([said, *kinds]))
        message = said if said.startswith(where) else f"{where} = {first['input']!r}: {said}"
        raise InputError(f"{message} (method {name!r})") from error


def parse_all(tables: Sequence[dict[str, Any]]) -> list[Method]:
    """All methods of a run; InputError where there is none or where two share a label."""
    if not tables:
        raise InputError(f'no method: add a [[methods]] table, e.g. name = "ekfac"; known: {", ".join(METHODS)}')
    methods = [parse(table) for table in tables]
    labels = [method.title for method in methods]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f'two methods are labelled {label!r}; give one of them its own label = "..."')
    return methods


__all__ = ["EKFAC", "KFAC", "METHODS", "GradCos", "GradDot", "Method", "parse", "parse_all"]
