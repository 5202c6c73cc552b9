"""The attribution methods, by the name that a run's `[[methods]]` uses."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

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
from tda.methods.multistage import Multistage, Pretraining
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
    "multistage": Multistage,
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
        raise InputError(f"{_said(*error.errors())} (method {name!r})") from error


def _said(detail: ErrorDetails, *others: ErrorDetails) -> str:
    """What is wrong with one option, which may stand in a [methods.pretraining] table, or in one within that.

    others: of an option that may be of several kinds, each says that it is not of one of them.
    """
    loc = [str(part) for part in detail["loc"]]
    depth = next((k for k, part in enumerate(loc) if part != "pretraining"), len(loc))
    path, said = loc[: depth + 1], detail["msg"].removeprefix("Value error, ")
    if len(loc) > len(path):
        kinds = [other["msg"].removeprefix("Input should be ") for other in others if list(map(str, other["loc"][: depth + 1])) == path]
        said = " or ".join(dict.fromkeys([said, *kinds]))
    where = ".".join(path)
    if detail["type"] == "missing":
        return f"missing option {where!r}" + ("; it is a table: [methods.pretraining] with problem" if path == ["pretraining"] else "")
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(path[-1], Pretraining.model_fields, n=1)
        return f"unknown option {where!r}; " + (f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(Pretraining.model_fields)}")
    if detail["type"] == "value_error" and (depth or not where or said.startswith(where)):
        return f"{'.'.join(path[:depth])}{'.' if depth else ''}{said}"
    return f"{where} = {detail['input']!r}: {said}" if where else said


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
