"""A run's configuration: a TOML file, checked key by key before anything is computed or written."""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from flows import secrets
from flows.cluster_config import ClusterConfig
from flows.config_candidates import CandidatesConfig
from flows.config_table import STRICT, Count, PowerOfTwo, Text
from flows.config_table import shown as _shown
from flows.tracing_options import TracingOptions
from tda.errors import InputError

PLAIN_WORDS = {  # what pydantic calls "Input should be a valid ..."
    "bool_type": "be true or false",
    "dict_type": "be a table",
    "greater_than_equal": "be at least {ge}",
    "int_type": "be a whole number",
    "float_type": "be a number",
    "less_than": "be below {lt}",
    "list_type": "be a list",
    "model_type": "be a table",
    "string_too_short": "not be empty",
    "string_type": "be text",
    "too_short": "not be empty",
    "tuple_type": "be a list",
}


class _Table(BaseModel):
    model_config = STRICT


class EvaluationConfig(TracingOptions, _Table):
    """The [evaluation] table: how `tda evaluate` retrains, or traces facts, and what it compares."""

    alphas: Annotated[list[float], Field(min_length=1)] = [0.5]
    """Shares of the training set in a subset."""
    subsets: Annotated[int, Field(ge=3)] = 100
    seeds: Count = 20
    """Models per subset; of fact tracing, trainings of both stages."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """What subsets, seeds of retraining, the split of the queries and the resamples are drawn from; not the run's."""
    tuning_queries: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the queries by which a damping is chosen; the others are reported."""
    draws: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the subsets behind each interval."""
    leave_one_out: Annotated[int, Field(ge=0)] = 0
    """So many training examples are left out one at a time."""
    removal: list[float] = []
    """Shares of the training set that are removed, the most helpful first, before retraining."""
    removal_queries: Count = 10
    retrainings: Count = 5
    """Models per example left out, and per removal."""
    randomised: bool = False
    """Also score an untrained model, whose scores should differ."""

    @field_validator("alphas", "removal")
    @classmethod
    def _shares_are_inside(cls, shares: list[float], info: ValidationInfo) -> list[float]:
        for share in shares:
            if not 0 < share < 1:
                raise ValueError(f"evaluation.{info.field_name} must be shares of the training set in (0, 1), got {_shown(share)}")
        if len(set(shares)) < len(shares):
            raise ValueError(f"evaluation.{info.field_name} = {_shown(shares)} names a share twice; leave one of them out")
        return shares

    @field_validator("leave_one_out")
    @classmethod
    def _enough_are_left_out(cls, count: int) -> int:
        if count in (1, 2):
            raise ValueError(f"evaluation.leave_one_out must be at least 3 for a rank correlation over examples, or 0, got {count}")
        return count


class RunConfig(_Table):
    """Everything that a run is told. Paths are absolute once load_config has read them."""

    problem: Text
    problem_options: dict[str, Any] = Field(default_factory=dict)
    store: Text = "file:./store"
    checkpoint: Text | None = None
    """URL or path of a safetensors file, with * for the newest of several, or of a .pointer file; None: the run trains the model."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    dtype: Literal["auto", "float32", "float64"] = "auto"
    """What is computed in; auto: the dtype of problem.model()."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models and batches lie; auto: on each worker's GPU, where it has one."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """What layers are computed in, forwards and backwards, where it is not the dtype; sums are in the dtype."""
    autocast_scale: PowerOfTwo = 1024.0
    """What the largest output gradient of an example is scaled to before a backward pass in float16."""
    products: Literal["full", "bfloat16"] = "full"
    """The inputs of matrix products; bfloat16 accumulates in float32."""
    checkpoint_activations: bool = False
    """Whether the insides of repeated layers are computed again in backward passes, and not kept."""
    modules: Annotated[list[Text], Field(min_length=1)] = ["*"]
    """Glob patterns over module names: what is attributed."""
    exclude: list[Text] = []
    batch_size: Count | None = None
    batch_tokens: Count | None = None
    """Tokens of a forward pass, padding counted, in place of batch_size; None: chosen from the sizes where a problem tells its lengths."""
    shard_size: Count | None = None
    """Training examples per shard, the unit of work and of resumption; None: chosen from the sizes."""
    layer_block: Count | None = None
    """Layers whose Kronecker factors are summed in one pass over the data; None: all."""
    query_block: Count | None = None
    query_rank: Count | None = None
    """Terms in which methods keep each layer's directions, where their own tables say nothing; None: in full."""
    self_influence: bool = True
    ensemble: Count = 1
    """Models that the run trains, with the seeds seed, seed + 1, ...; scores are averaged over them."""
    methods: Annotated[list[dict[str, Any]], Field(min_length=1)]
    """[[methods]] tables as written; tda.methods.parse_all has accepted them, each list of dampings as one method per value."""
    candidates: CandidatesConfig | None = None
    """Which training examples are scored; None: all."""
    evaluation: EvaluationConfig | None = None
    """For `tda evaluate` alone; None: its defaults."""
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @field_validator("problem_options")
    @classmethod
    def _options_are_json(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):  # TOML has dates, times, nan and inf; a run's manifest cannot hold them
                raise ValueError(
                    f"problem_options.{key} is {_shown(value)}, which JSON does not have; write it as text in quotes"
                ) from None
        return options

    @field_validator("cluster")
    @classmethod
    def _gpus_are_used(cls, cluster: ClusterConfig, info: ValidationInfo) -> ClusterConfig:
        if cluster.kind == "cuda" and info.data.get("device") == "cpu":
            raise ValueError('cluster.kind = "cuda" starts a worker for each GPU, and device = "cpu" would use none of them; remove one')
        return cluster

    @field_validator("problem_options", "methods", "checkpoint")
    @classmethod
    def _no_secrets(cls, value: Any, info: ValidationInfo) -> Any:
        secrets.refuse(value, str(info.field_name))
        return value


def load_config(path: str | Path, overrides: Sequence[str] = (), store: str | None = None, *, pin: bool = True) -> RunConfig:
    """Read a run's TOML file.

    Args:
        path: the file. A problem's .py file and a checkpoint that it names by a relative path lie beside it; a relative store
            lies in the current directory.
        overrides: "key=value" each, as --set gives them: dotted keys ("cluster.workers=4", "methods.0.damping=0.1"), values in TOML or
            else plain text. They win over the file.
        store: wins over both.
        pin: a checkpoint that is a pattern or a pointer becomes the file that it means now (`flows.newest`).

    Raises:
        InputError: one line that names the file (or --set), the key, the value and the way out.
    """
    file = Path(path)
    document = _read(file)
    sources = {_apply(document, override): f"--set {override}" for override in overrides}
    if store is not None:
        document["store"] = store
        sources["store"] = f"--store {store}"
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        _refuse(file, error, sources)
    resolved = _resolved(file, config, sources)
    if not pin:
        return resolved
    from flows.newest import pinned

    return pinned(resolved)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.toml")], n=1)
        hint = f'did you mean "{file.with_name(near[0])}"?' if near else "give the path of a run's TOML file"
        raise InputError(f"{file}: no such file; {hint}") from None
    except IsADirectoryError:
        raise InputError(f"{file}: is a folder; give the path of a run's TOML file") from None
    except PermissionError:
        raise InputError(f"{file}: may not be read; check its permissions") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{file}: is not valid TOML: {error}; text values need quotes") from error


def _apply(document: dict[str, Any], override: str) -> str:
    """Write one key=value into the document; the dotted key."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise InputError(f'--set "{override}": is not key=value; for example --set seed=1 or --set cluster.workers=4')
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    node: Any = document
    for done, part in enumerate(parents):
        node = _child(node, part, override, ".".join(parents[: done + 1]))
    if isinstance(node, list):
        node[_position(node, last, override, key)] = value
    else:
        node[last] = value
    return key


def _child(node: Any, part: str, override: str, so_far: str) -> Any:
    child = node[_position(node, part, override, so_far)] if isinstance(node, list) else node.setdefault(part, {})
    if not isinstance(child, dict | list):
        raise InputError(f'--set "{override}": "{so_far}" is {_shown(child)}, not a table; set it as a whole')
    return child


def _position(node: list[Any], part: str, override: str, so_far: str) -> int:
    if part.isdecimal() and int(part) < len(node):
        return int(part)
    raise InputError(f'--set "{override}": "{so_far}" does not exist; the list has {len(node)}, counted from 0')


def _refuse(file: Path, error: ValidationError, sources: dict[str, str]) -> NoReturn:
    """Raise what matters most as one line: a misspelt key first, since it often explains a missing one."""
    details = sorted(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    first = details[0]
    key = _dotted(first["loc"])
    raise InputError(f"{_source(file, key, sources)}: {_said(first, key)}") from error


def _source(file: Path, key: str, sources: dict[str, str]) -> str:
    """Where a key's value came from: the option that set it, a part of it or what holds it; else the file."""
    for changed, option in sources.items():
        if f"{changed}.".startswith(f"{key}.") or f"{key}.".startswith(f"{changed}."):
            return option
    return str(file)


def _said(detail: ErrorDetails, key: str) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1])
        near = difflib.get_close_matches(str(detail["loc"][-1]), known, n=1)
        way_out = f'did you mean "{near[0]}"?' if near else f"known are {', '.join(known)}"
        return f'unknown key "{key}"; {way_out}'
    if kind == "missing":
        example = {"problem": 'problem = "tda.problems.digits:Digits"', "methods": 'a table [[methods]] with name = "ekfac"'}.get(key, key)
        return f'missing key "{key}"; add {example}'
    if kind == "literal_error":
        expected = detail.get("ctx", {})["expected"]
        near = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", expected), n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
        return f"{key} must be {expected.replace(chr(39), chr(34))}, got {_shown(value)}{hint}"
    if kind == "value_error":
        return detail["msg"].removeprefix("Value error, ")
    must = PLAIN_WORDS.get(kind, f"be valid ({detail['msg']})").format(**detail.get("ctx", {}))
    return f"{key} must {must}, got {_shown(value)}"


def _known_keys(parents: Sequence[int | str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for parent in parents:
        annotation = model.model_fields[str(parent)].annotation
        for inner in (annotation, *get_args(annotation)):  # a table that may be absent is a union with None
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    return list(model.model_fields)


def _dotted(loc: Sequence[int | str]) -> str:
    # A union names its member ("int", "constrained-str") behind the key; no key of ours looks like these.
    return ".".join(str(part) for part in loc if str(part) not in {"int", "constrained-int", "str", "constrained-str"})


def _resolved(file: Path, config: RunConfig, sources: dict[str, str]) -> RunConfig:
    """The configuration with its methods checked and its paths absolute."""
    from tda.location import resolve
    from tda.methods import parse_all
    from tda.methods.sweep import expand, ranked

    folder = file.absolute().parent
    changes: dict[str, Any] = {}
    uses: dict[str, Callable[[Any], Any]] = {
        "methods": lambda methods: parse_all([swept.table for swept in expand(methods)]) and [_stages(table, folder) for table in methods],
        "query_rank": lambda rank: ranked(config.methods, rank) and rank,
        "store": resolve,
        "problem": lambda problem: _problem(problem, folder),
        "candidates": lambda table: table and table.placed(folder),
        "checkpoint": lambda checkpoint: checkpoint and resolve(checkpoint, folder),
        "problem_options": lambda options: _options(options, changes["problem"], folder),
        "evaluation": lambda told: told and told.model_copy(update={"embedding": told.embedding and resolve(told.embedding, folder)}),
    }
    for key, use in uses.items():
        try:
            changes[key] = use(getattr(config, key))
        except InputError as error:
            raise InputError(f"{_source(file, key, sources)}: {error}") from error
    return config.model_copy(update=changes)


def _options(options: dict[str, Any], problem: str, folder: Path) -> dict[str, Any]:
    """The options with those that the problem calls paths made absolute. A problem that cannot be imported is refused later, by name."""
    from tda.location import resolve
    from tda.problem import import_problem

    texts = {key: value for key, value in options.items() if isinstance(value, str) and value}
    if not texts:
        return options
    try:
        kind = getattr(import_problem(problem), problem.rpartition(":")[2], None)
    except InputError:
        return options
    return options | {key: resolve(value, folder) for key, value in texts.items() if key in getattr(kind, "paths", ())}


def _stages(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A [[methods]] table with the problems, checkpoints and other paths of its [methods.pretraining] tables made absolute."""
    from tda.location import resolve

    stage = table.get("pretraining")
    if not isinstance(stage, dict):
        return table
    problem = _problem(stage["problem"], folder)
    changes: dict[str, Any] = {"problem": problem, "problem_options": _options(stage.get("problem_options", {}), problem, folder)}
    if "checkpoint" in stage:
        changes["checkpoint"] = resolve(stage["checkpoint"], folder)
    return table | {"pretraining": _stages(stage | changes, folder)}


def _problem(reference: str, folder: Path) -> str:
    """A reference module:Class as it is; file.py:Class with the file's absolute path."""
    module, colon, name = reference.rpartition(":")
    if not (colon and module and name.isidentifier()):
        raise InputError(f'problem must be "package.module:Class" or "path/to/file.py:Class", got "{reference}"')
    if not module.endswith(".py"):
        return reference
    source = (folder / module).absolute()
    if not source.is_file():
        raise InputError(f'problem "{reference}": {source} does not exist; the path is taken from the folder of the configuration')
    return f"{source}:{name}"
