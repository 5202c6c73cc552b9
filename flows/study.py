"""The configuration of a study of the curvature ladder: a TOML file, read and checked as a run's is."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from flows.cluster_config import ClusterConfig
from flows.config import _apply, _problem, _read, _refuse, _source, _Table
from flows.config_table import Count, Text
from flows.config_table import shown as _shown
from tda.errors import InputError

Seed = Annotated[int, Field(ge=0, lt=2**63)]


class InverseConfig(_Table):
    """One [[inverses]] table: what is made of the eigenvalues of every rung (tda.curvature.spectrum.Inverse)."""

    label: Annotated[str | None, Field(min_length=1, max_length=64)] = None
    damping: Any = 0.0
    """lambda, or "heuristic"."""
    pinv: Any = None
    relative: bool = False
    negative: Literal["drop", "abs", "keep"] = "drop"

    def options(self) -> dict[str, Any]:
        """As Inverse takes them."""
        return self.model_dump(exclude={"label"})

    @property
    def title(self) -> str:
        """Its label, or one made of what it does."""
        if self.label is not None:
            return self.label
        parts = []
        if self.pinv is not None:
            parts.append(f"pinv {self.pinv:g}{' of the largest' if self.relative else ''}")
        if self.damping != 0:
            parts.append(f"damping {self.damping if isinstance(self.damping, str) else format(self.damping, 'g')}")
        return ", ".join([*parts, *([] if self.negative == "drop" else [f"negative {self.negative}"])])


class EvaluationConfig(_Table):
    """The [evaluation] table: LDS by rung. Every subset is trained `seeds` times."""

    alphas: Annotated[list[float], Field(min_length=1)] = Field(default_factory=lambda: [0.5])
    subsets: Annotated[int, Field(ge=3)] = 100
    seeds: Count = 10

    @field_validator("alphas")
    @classmethod
    def _alphas_are_shares(cls, alphas: list[float]) -> list[float]:
        if any(not 0 < alpha < 1 for alpha in alphas) or len(set(alphas)) < len(alphas):
            raise ValueError(f"evaluation.alphas must be different shares of the training examples, between 0 and 1, got {_shown(alphas)}")
        return alphas


class StudyConfig(_Table):
    """Everything that a study is told. Paths are absolute once load_study has read them."""

    problem: Text
    problem_options: dict[str, Any] = Field(default_factory=dict)
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Options of the problem by lists of values; every combination is a point."""
    progress: Annotated[list[float], Field(min_length=1)] = Field(default_factory=lambda: [1.0])
    """Shares of each training at which it is measured; below 1: the stored checkpoint that is nearest."""
    store: Text = "file:./store"
    seed: Seed = 0
    modules: Annotated[list[Text], Field(min_length=1)] = Field(default_factory=lambda: ["*"])
    exclude: list[Text] = Field(default_factory=list)
    memory_limit: Any = "8GiB"
    """What the dense matrices of one point may take in a worker; larger points are left out, and named."""
    batch_size: Count | None = None
    keep_spectra: bool = True
    """Keep the eigenvectors in the store; other inverses are then measured without decomposing anything again."""
    inverses: Annotated[list[InverseConfig], Field(min_length=1)] = Field(
        default_factory=lambda: [InverseConfig(pinv=1e-4), InverseConfig(damping=1e-3)]
    )
    evaluation: EvaluationConfig | None = None
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @field_validator("problem_options", "sweep")
    @classmethod
    def _options_are_json(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise ValueError(f"{key} is {_shown(value)}, which JSON does not have; write it as text in quotes") from None
        return options

    @field_validator("memory_limit")
    @classmethod
    def _memory_is_a_size(cls, value: Any) -> Any:
        from tda.methods.spectral import parse_bytes

        parse_bytes(value)
        return value

    @field_validator("progress")
    @classmethod
    def _progress_is_a_share(cls, shares: list[float]) -> list[float]:
        for share in shares:
            if not 0 < share <= 1:
                raise ValueError(f"progress must be shares of the training, above 0 and up to 1, got {_shown(share)}")
        return sorted(set(shares))


def load_study(path: str | Path, overrides: Sequence[str] = (), store: str | None = None) -> StudyConfig:
    """Read a study's TOML file; arguments and errors are those of flows.config.load_config."""
    file = Path(path)
    document = _read(file)
    sources = {_apply(document, override): f"--set {override}" for override in overrides}
    if store is not None:
        document["store"] = store
        sources["store"] = f"--store {store}"
    _check_keys(file, document, StudyConfig, (), sources)
    try:
        config = StudyConfig.model_validate(document)
    except ValidationError as error:
        _refuse(file, error, sources)
    return _resolved(file, config, sources)


def _check_keys(file: Path, table: Mapping[str, Any], model: type[BaseModel], parents: tuple[str, ...], sources: dict[str, str]) -> None:
    """InputError for the first unknown key, in this table or those in it, with the nearest known one."""
    for key, value in table.items():
        dotted = ".".join((*parents, key))
        if key not in model.model_fields:
            near = difflib.get_close_matches(key, model.model_fields, n=1)
            way_out = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(model.model_fields)}"
            raise InputError(f'{_source(file, dotted, sources)}: unknown key "{dotted}"; {way_out}')
        tables: dict[str, type[BaseModel]] = {} if parents else {"cluster": ClusterConfig, "evaluation": EvaluationConfig}
        inner = tables.get(key)
        if inner is not None and isinstance(value, dict):
            _check_keys(file, value, inner, (key,), sources)
        if key == "inverses" and not parents and isinstance(value, list):
            for i, each in enumerate(value):
                if isinstance(each, dict):
                    _check_keys(file, each, InverseConfig, ("inverses", str(i)), sources)


def _resolved(file: Path, config: StudyConfig, sources: dict[str, str]) -> StudyConfig:
    """The configuration with its inverses checked and its paths absolute."""
    from tda.location import resolve

    changes: dict[str, Any] = {}
    uses: dict[str, Callable[[Any], Any]] = {
        "inverses": _check_inverses,
        "sweep": lambda sweep: _check_sweep(sweep, config.problem_options),
        "store": resolve,
        "problem": lambda problem: _problem(problem, file.absolute().parent),
    }
    for key, use in uses.items():
        try:
            changes[key] = use(getattr(config, key))
        except InputError as error:
            raise InputError(f"{_source(file, key, sources)}: {error}") from error
    return config.model_copy(update=changes)


def _check_inverses(tables: list[InverseConfig]) -> list[InverseConfig]:
    from tda.curvature.spectrum import Inverse

    for i, table in enumerate(tables):
        try:
            Inverse(**table.options())
        except InputError as error:
            raise InputError(f"inverses.{i}: {error}") from error
        if table.damping == 0 and table.pinv is None:
            raise InputError(f"inverses.{i}: without damping or pinv rounding would be inverted; give e.g. damping = 1e-3 or pinv = 1e-4")
    titles = [table.title for table in tables]
    for title in titles:
        if titles.count(title) > 1:
            raise InputError(f'two inverses are labelled "{title}"; give one of them its own label = "..."')
    return tables


def _check_sweep(sweep: dict[str, list[Any]], fixed: dict[str, Any]) -> dict[str, list[Any]]:
    for key, values in sweep.items():
        if key in fixed:
            raise InputError(f"{key} is both in [problem_options] and in [sweep]; leave it in one of them")
        if key == "progress":
            raise InputError(
                "sweep.progress: results call the share of the training so, and an option of that name cannot be swept beside it; "
                "move progress out of [sweep], above all tables, or call the problem's option otherwise"
            )
        if any(value in values[:i] for i, value in enumerate(values)):  # by value: 1 and 1.0 are one place on an axis
            raise InputError(f"sweep.{key} = {_shown(values)} names a value twice; leave one of them out")
    return sweep
