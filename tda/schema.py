"""Every stored array: its name, dimensions, dtype, units, sign and meaning; checked when written and when opened.

An array's spec is found by the last part of its name, so that "layers/3/eigenvalues" is checked as "eigenvalues".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import zarr
from zarr.codecs import ZstdCodec

from tda.errors import InputError
from tda.read_store import LARGEST

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np

#: Raised by one when a reader of the version before would misread what is written now.
SCHEMA_VERSION = 1

SIGN = (
    "influence[q, i] = d f_q / d eps_i: the predicted change of the measurement when example i is added to training with weight 1/N; "
    "sum over a group predicts the group"
)
UNITS = "units of the measurement (nats for the loss)"

_SINGLE = ("float32",)
_FLOAT = ("float32", "float64")
_DOUBLE = ("float64",)
_INTEGER = ("int64",)


@dataclass(frozen=True)
class ArraySpec:
    """One kind of stored array.

    Args:
        name: the last part of the array's path.
        dims: the names of its axes.
        dtypes: what may be stored; the first is the default.
        meaning: what one element is.
        units: of one element; "1" where it is a pure number.
        sign: what a positive element says; empty where it says nothing.
        fill: what a chunk that was never written reads as.
    """

    name: str
    dims: tuple[str, ...]
    dtypes: tuple[str, ...]
    meaning: str
    units: str = "1"
    sign: str = ""
    fill: float | int | str = 0


#: How arrays are packed: nothing else is unpacked.
CODECS = {"BytesCodec", "VLenUTF8Codec", "ZstdCodec"}

_NAN = float("nan")
_SQUARED_GRADIENT = "nats^2 per parameter^2"
_CURVATURE = "nats per parameter^2"

_RESULTS = (
    ArraySpec("influence", ("method", "query", "train"), _SINGLE, "influence of a training example on a query", UNITS, SIGN, _NAN),
    ArraySpec(
        "stderr",
        ("method", "query", "train"),
        _SINGLE,
        "standard error of the influence: over an ensemble's models, else of what was sampled; NaN where a method gives none",
        UNITS,
        "",
        _NAN,
    ),
    ArraySpec("self_influence", ("method", "train"), _SINGLE, "influence of a training example on its own loss", "nats", SIGN, _NAN),
    ArraySpec("method", ("method",), ("str",), "label of a method", fill=""),
    ArraySpec("query", ("query",), _INTEGER, "id of a query: its index in problem.query_data()", fill=-1),
    ArraySpec("train", ("train",), _INTEGER, "id of a training example: its index in problem.train_data()", fill=-1),
    ArraySpec("query_label", ("query",), _INTEGER, "label of a query, where labels are integers", fill=-1),
    ArraySpec("train_label", ("train",), _INTEGER, "label of a training example, where labels are integers", fill=-1),
    ArraySpec("query_measurement", ("query",), _SINGLE, "measurement f_q at the checkpoint", UNITS, fill=_NAN),
    ArraySpec("train_loss", ("train",), _SINGLE, "loss of a training example at the checkpoint", "nats", fill=_NAN),
)

# Where candidates were scored in place of a whole training set, in place of `influence`; `run.candidates` has them without the prefix.
# The candidates of a query are padded to those of the query that has most.
_CANDIDATES = (
    ArraySpec("candidate_id", ("query", "candidate"), _INTEGER, "id of a training example that was scored; -1: padding", fill=-1),
    ArraySpec("candidate_source", ("query", "candidate"), ("uint8",), "sum of 1 (bm25), 2 (embedding), 4 (gold), 8 (random); 0: padding"),
    ArraySpec("candidate_influence", ("method", "query", "candidate"), _SINGLE, "influence of a candidate on its query", UNITS, SIGN, _NAN),
    ArraySpec("candidate_stderr", ("method", "query", "candidate"), _SINGLE, "standard error of the influence", UNITS, "", _NAN),
    ArraySpec("candidate_label", ("query", "candidate"), _INTEGER, "label of a candidate, where labels are integers", fill=-1),
    ArraySpec("candidate_loss", ("query", "candidate"), _SINGLE, "loss of a candidate at the checkpoint", "nats", "", _NAN),
    ArraySpec("embedding", ("example", "dimension"), _SINGLE, "sentence embedding of an example, of unit length", fill=_NAN),
)

# One group per layer; a convolution with groups has several matrices, every other layer has one.
# A (in x in) and S (out x out) are its Kronecker factors; basis_in and basis_out hold their eigenvectors.
_FACTORS = (
    ArraySpec("eigenvalues", ("group", "out", "in"), _FLOAT, "Lambda: mean squared gradient in the basis", _SQUARED_GRADIENT, fill=_NAN),
    ArraySpec("kfac_in", ("group", "in"), _FLOAT, "eigenvalues of A = E[a a^T], at least 0", fill=_NAN),
    ArraySpec("kfac_out", ("group", "out"), _FLOAT, "eigenvalues of S = E[s s^T], at least 0", _SQUARED_GRADIENT, fill=_NAN),
    ArraySpec("basis_in", ("group", "in", "in_basis"), _FLOAT, "eigenvectors of A, one per column", fill=_NAN),
    ArraySpec("basis_out", ("group", "out", "out_basis"), _FLOAT, "eigenvectors of S, one per column", fill=_NAN),
)

# One group per diagonal block of a curvature matrix: of the whole matrix, or of one layer.
_SPECTRA = (
    ArraySpec("spectrum", ("eigenvector",), _DOUBLE, "eigenvalues of the curvature, ascending", _CURVATURE, fill=_NAN),
    ArraySpec("eigenvectors", ("eigenvector", "parameter"), _DOUBLE, "eigenvectors of the curvature, one per row", fill=_NAN),
)

_WIDE = ("float64",)
_TEXT = ("str",)

# A study of the curvature ladder: one point per combination of swept options (and share of the training). NaN where a point was refused,
# and where a rung is above its reference.
_STUDIES = (
    ArraySpec("error", ("point", "definition", "inverse", "reference", "rung"), _WIDE, "relative error of a rung's inverse", fill=_NAN),
    ArraySpec(
        "error_share", ("point", "definition", "inverse", "reference", "step"), _WIDE, "a step's increase of the error / K-FAC's", fill=_NAN
    ),
    ArraySpec("matrix_error", ("point", "reference", "rung"), _WIDE, "||R - A||_F / ||R||_F, nothing inverted", fill=_NAN),
    ArraySpec(
        "layer_error",
        ("point", "inverse", "reference", "rung", "layer"),
        _WIDE,
        "relative error of the inverse's diagonal block",
        fill=_NAN,
    ),
    ArraySpec(
        "layer_mass", ("point", "reference", "layer", "other_layer"), _WIDE, "Frobenius norm of a block", _SQUARED_GRADIENT, fill=_NAN
    ),
    ArraySpec("off_block_mass", ("point", "reference"), _WIDE, "||M - blk(M)||_F / ||M||_F", fill=_NAN),
    ArraySpec("basis_overlap", ("point", "reference", "rung", "top"), _WIDE, "||V_k^T W_k||_F^2 / k of the top k", fill=_NAN),
    ArraySpec("layer_basis_overlap", ("point", "rung", "layer", "top"), _WIDE, "the same within a layer, by block_ggn", fill=_NAN),
    ArraySpec("spectrum_overlap", ("point", "reference", "rung"), _WIDE, "1 - ||sorted s - sorted t|| / ||s||", fill=_NAN),
    ArraySpec("layer_spectrum_overlap", ("point", "rung", "layer"), _WIDE, "the same within a layer, by block_ggn", fill=_NAN),
    ArraySpec(
        "spectrum_curve", ("point", "rung", "quantile"), _WIDE, "eigenvalue at a share of the ranks", "nats per parameter^2", fill=_NAN
    ),
    ArraySpec("kept", ("point", "inverse", "rung"), _WIDE, "share of the directions that the inverse keeps", fill=_NAN),
    ArraySpec("agreement", ("point", "inverse", "rung"), _WIDE, "mean over queries of Spearman with the Hessian's scores", fill=_NAN),
    ArraySpec("rung_lds", ("point", "alpha", "inverse", "rung", "query"), _WIDE, "linear datamodelling score", fill=_NAN),
    ArraySpec("rung_lds_bound", ("point", "alpha", "inverse", "rung", "bound"), _WIDE, "95% bootstrap interval of the mean", fill=_NAN),
    ArraySpec("rung_lds_step_bound", ("point", "alpha", "inverse", "step", "bound"), _WIDE, "95% interval of a step's change", fill=_NAN),
    ArraySpec("rung_lds_ceiling", ("point", "alpha"), _WIDE, "the LDS that a perfect prediction would reach", fill=_NAN),
    ArraySpec("negative_mass", ("point",), _WIDE, "norm of the Hessian's negative eigenvalues / of all", fill=_NAN),
    ArraySpec("gradient_norm", ("point",), _WIDE, "norm of the mean training gradient at the checkpoint", "nats per parameter", fill=_NAN),
    ArraySpec("mean_loss", ("point", "split"), _WIDE, "mean loss of a split at the checkpoint", "nats", fill=_NAN),
    ArraySpec("parameters", ("point",), _INTEGER, "D: attributed parameters", fill=-1),
    ArraySpec("projected_bytes", ("point",), _INTEGER, "what a worker holds at most for the dense matrices", "bytes", fill=-1),
    ArraySpec("refused", ("point",), _TEXT, "why a point was left out; empty where it was measured", fill=""),
    ArraySpec("layer_name", ("point", "layer"), _TEXT, "name of a layer; empty beyond the last", fill=""),
    *(
        ArraySpec(name, (name,), _TEXT, meaning, fill="")
        for name, meaning in {
            "definition": "inverse: ||R+ - A+|| / ||R+||; product: ||R A+ - Pi|| / ||Pi||",
            "inverse": "label of an inverse: its damping, threshold and treatment of negative eigenvalues",
            "reference": "rung that others are compared with",
            "rung": "rung of the ladder",
            "split": "of the data",
            "step": "from a rung to the next",
        }.items()
    ),
    *(
        ArraySpec(name, (name,), _WIDE, meaning, fill=_NAN)
        for name, meaning in {
            "alpha": "share of the training examples in a subset",
            "bound": "which end of an interval",
            "quantile": "share of the ranks, from the largest eigenvalue on",
            "top": "share of the eigenvectors, from the largest eigenvalue on",
        }.items()
    ),
)

# One group per method and solve.
_SOLVES = (
    ArraySpec("residual", ("step", "query"), _SINGLE, "||g - (C + damping) v|| / ||g|| of a solve after each step", fill=_NAN),
    ArraySpec("evaluations", ("step",), ("float64",), "products with one example's curvature, per query, until then", fill=_NAN),
)

# One group per ground truth: what models retrained on subsets measure.
_RETRAINING = (
    ArraySpec("masks", ("alpha", "subset", "train"), ("bool",), "whether a training example is in a subset", fill=False),
    ArraySpec(
        "measurement", ("alpha", "subset", "seed", "query"), _WIDE, "measurement f_q of the model retrained on a subset", UNITS, fill=_NAN
    ),
    ArraySpec("training_seed", ("alpha", "subset", "seed"), _INTEGER, "seed of a retraining: of its weights and of its batches", fill=-1),
)

# Chains around a checkpoint w*: losses and measurements along them, less those at w*. NaN where a chain was lost.
_TRAJECTORIES = (
    ArraySpec("loss_train", ("chain", "draw", "train"), _SINGLE, "l(w) - l(w*) of a training example", "nats", fill=_NAN),
    ArraySpec("loss_query", ("chain", "draw", "query"), _SINGLE, "l(w) - l(w*) of a query", "nats", fill=_NAN),
    ArraySpec("measurement_query", ("chain", "draw", "query"), _SINGLE, "f(w) - f(w*) of a query", UNITS, fill=_NAN),
    ArraySpec(
        "token_loss_train",
        ("chain", "draw", "train", "train_token"),
        _SINGLE,
        "a token's part of l(w) - l(w*)",
        "nats",
        "",
        _NAN,
    ),
    ArraySpec(
        "token_loss_query",
        ("chain", "draw", "query", "query_token"),
        _SINGLE,
        "a token's part of l(w) - l(w*)",
        "nats",
        "",
        _NAN,
    ),
    ArraySpec("mean_loss_train", ("chain", "draw"), _WIDE, "mean over the training set of l(w) - l(w*)", "nats", fill=_NAN),
    ArraySpec("distance", ("chain", "draw"), _SINGLE, "||w - w*|| over the attributed parameters", fill=_NAN),
    ArraySpec("batch_loss", ("chain", "step"), _SINGLE, "mean loss of a step's batch, before it; burn-in included", "nats", fill=_NAN),
)

# What `tda evaluate` finds, beside the ground truth that it uses.
_EVALUATION = (
    ArraySpec("lds", ("method", "alpha", "query"), _WIDE, "linear datamodelling score of a query", fill=_NAN),
    ArraySpec("interval", ("method", "alpha", "bound"), _WIDE, "95% bootstrap interval of the mean LDS over reported queries", fill=_NAN),
    ArraySpec(
        "ceiling", ("alpha", "query"), _WIDE, "the LDS that a perfect prediction would reach, by split halves of the seeds", fill=_NAN
    ),
    ArraySpec("lds_draws", ("method", "alpha", "draw"), _WIDE, "mean LDS over reported queries of a resample of the subsets", fill=_NAN),
    ArraySpec("member_lds", ("member", "method", "alpha", "query"), _WIDE, "LDS of one model of an ensemble", fill=_NAN),
    ArraySpec(
        "league", ("method", "alpha", "metric", "statistic"), _WIDE, "a metric over reported queries, and its 95% interval", fill=_NAN
    ),
    ArraySpec("tuning_query", ("query",), ("bool",), "whether a query served to choose dampings, and is not reported", fill=False),
    ArraySpec("chosen", ("method",), ("bool",), "whether a method is the best of its damping sweep on the tuning queries", fill=False),
    ArraySpec("family", ("method",), _TEXT, "label of the sweep that a method belongs to", fill=""),
    ArraySpec("damping", ("method",), _TEXT, "damping as configured; empty where a method has none", fill=""),
    ArraySpec("seconds", ("method",), _WIDE, "work of fits, directions and the method's part of the scoring", "seconds", fill=_NAN),
    ArraySpec("leave_one_out", ("method", "query"), _WIDE, "rank correlation with the effects of single examples", fill=_NAN),
    ArraySpec(
        "mean_ceiling", ("alpha", "statistic"), _WIDE, "the same for the mean over reported queries, and its 95% interval", fill=_NAN
    ),
    ArraySpec("leave_one_out_mean_ceiling", ("statistic",), _WIDE, "what a perfect prediction of them would reach on average", fill=_NAN),
    ArraySpec("leave_one_out_ceiling", ("query",), _WIDE, "what a perfect prediction of them would reach", fill=_NAN),
    ArraySpec("effect", ("left_out", "repeat", "query"), _WIDE, "f(everything) - f(all but one example)", UNITS, SIGN, _NAN),
    ArraySpec("left_out", ("left_out",), _INTEGER, "id of a training example that was left out", fill=-1),
    ArraySpec("retrieval", ("method", "query"), _WIDE, "share of the most helpful examples that have the query's label", fill=_NAN),
    ArraySpec("mislabelled_precision", ("method", "inspected"), _WIDE, "share of wrong labels among the most suspicious", fill=_NAN),
    ArraySpec("inspected", ("inspected",), _INTEGER, "how many training examples are inspected", fill=-1),
    ArraySpec("randomised", ("method", "query"), _WIDE, "rank correlation with the scores of an untrained model", fill=_NAN),
    ArraySpec(
        "harm", ("curve", "share", "asked"), _WIDE, "how much worse a query became without its most helpful examples", UNITS, fill=_NAN
    ),
    ArraySpec("curve", ("curve",), _TEXT, "label of the method whose ranking was removed", fill=""),
    ArraySpec("share", ("share",), _WIDE, "share of the training examples that was removed", fill=_NAN),
    ArraySpec("asked", ("asked",), _INTEGER, "id of a query whose most helpful examples were removed", fill=-1),
    ArraySpec("metric", ("metric",), _TEXT, "what the league table compares", fill=""),
    ArraySpec("statistic", ("statistic",), _TEXT, "estimate, low or high", fill=""),
    # Of fact tracing.
    ArraySpec("gold_rank", ("method", "seed", "query"), _WIDE, "rank of the first document that states what is asked, from 1", fill=_NAN),
    ArraySpec("gold_recall", ("method", "seed", "query"), _WIDE, "share of these documents among the ten nearest", fill=_NAN),
    ArraySpec("answer", ("seed", "query"), _WIDE, "measurement f_q of the fine-tuned model", UNITS, fill=_NAN),
    ArraySpec("run_seed", ("seed",), _INTEGER, "seed of the run that trained both stages", fill=-1),
    ArraySpec("at", ("method",), _TEXT, "checkpoint of the scores: both, finetuned, pretrained; text where no model is seen", fill=""),
    ArraySpec("tracing", ("method", "metric", "statistic"), _WIDE, "a metric over reported queries, and its 95% interval", fill=_NAN),
)

SPECS: Mapping[str, ArraySpec] = {
    spec.name: spec
    for spec in (*_RESULTS, *_CANDIDATES, *_SOLVES, *_RETRAINING, *_TRAJECTORIES, *_EVALUATION, *_STUDIES, *_FACTORS, *_SPECTRA)
}


def create_array(
    group: zarr.Group,
    name: str,
    shape: Sequence[int],
    chunks: Sequence[int] | None = None,
    attrs: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> zarr.Array[Any]:
    """Create the array `name` in a group, with the registry's dims, fill, units, sign and meaning.

    Writers fill whole chunks; a chunk that was never written reads as the spec's fill (NaN for numbers that matter). Chunks carry a
    checksum: a damaged one fails to read.

    Args:
        group: open for writing.
        name: a registered name, with folders before it if wanted ("layers/3/eigenvalues").
        shape: one length per dim.
        chunks: one length per dim; one chunk when absent.
        attrs: further attributes, such as the damping.
        dtype: one of the spec's; its first when absent.

    Raises:
        ValueError: the name is not registered, or shape, chunks or dtype do not suit its spec.
        zarr.errors.ContainsArrayError: the array is there already.
    """
    spec = spec_of(name)
    dtype = dtype or spec.dtypes[0]
    if dtype not in spec.dtypes:
        raise ValueError(f"array {name!r} is stored as {' or '.join(spec.dtypes)}, not as {dtype}")
    chunks = tuple(max(1, n) for n in shape) if chunks is None else tuple(chunks)
    if len(shape) != len(spec.dims) or len(chunks) != len(spec.dims) or min(shape) < 0 or min(chunks) < 1:
        raise ValueError(f"array {name!r} has the dims {spec.dims}; shape {tuple(shape)} with chunks {chunks} does not suit them")
    described = {"units": spec.units, "meaning": spec.meaning} | ({"sign": spec.sign} if spec.sign else {})
    return group.create_array(
        name,
        shape=tuple(shape),
        chunks=chunks,
        dtype=dtype,
        fill_value=spec.fill,
        compressors=ZstdCodec(level=1, checksum=True),
        dimension_names=spec.dims,
        attributes=described | dict(attrs or {}),
    )


def validate(group: zarr.Group, names: Iterable[str]) -> None:
    """Check that each array is there with its registered dims and dtype, and that one dim has one length in a folder.

    Reads metadata only.

    Raises:
        InputError: an array is absent or does not suit its spec, or a newer version of the schema wrote the group.
    """
    check_version(group.attrs, str(group.store_path))
    lengths: dict[tuple[str, str], tuple[int, str]] = {}
    for name in names:
        array = _checked(group, name)
        folder = name.rpartition("/")[0]
        for dim, length in zip(spec_of(name).dims, array.shape, strict=True):
            known, other = lengths.setdefault((folder, dim), (length, name))
            if known != length:
                raise InputError(f"{group.store_path}: {name!r} has {length} along {dim!r} and {other!r} has {known}; the store is damaged")


def check_version(attrs: Mapping[str, Any], where: str) -> None:
    """Refuse what a newer version of this package has written.

    Raises:
        InputError: `attrs["schema_version"]` is absent, not a number, or above SCHEMA_VERSION.
    """
    version = attrs.get("schema_version")
    if not isinstance(version, int):
        raise InputError(f"{where} has schema_version {version!r}; it was not written by tda, or is damaged")
    if version > SCHEMA_VERSION:
        raise InputError(f"{where} has schema_version {version}, and this tda reads up to {SCHEMA_VERSION}; upgrade tda to open it")


def spec_of(name: str) -> ArraySpec:
    """The spec of an array, by the last part of its name.

    Raises:
        ValueError: the name is not registered.
    """
    spec = SPECS.get(name.rpartition("/")[2])
    if spec is None:
        raise ValueError(f"array {name!r} is not in the schema; add its spec to tda/schema.py (known: {', '.join(sorted(SPECS))})")
    return spec


def _checked(group: zarr.Group, name: str) -> zarr.Array[Any]:
    spec = spec_of(name)
    array = group.get(name)
    if not isinstance(array, zarr.Array):
        raise InputError(f"{group.store_path} has no array {name!r} ({spec.meaning}); the store is damaged, or another stage wrote it")
    dims = getattr(array.metadata, "dimension_names", None)
    if dims != spec.dims:
        raise InputError(f"{group.store_path}: {name!r} has the dims {dims}, expected {spec.dims}; the store is damaged")
    _check_size(array, f"{group.store_path}: {name!r}")
    if _dtype_name(array.dtype) not in spec.dtypes:
        found, expected = _dtype_name(array.dtype), " or ".join(spec.dtypes)
        raise InputError(f"{group.store_path}: {name!r} is {found}, expected {expected}; the store is damaged")
    return array


def _check_size(array: zarr.Array[Any], where: str) -> None:
    """Refuse what would take more memory than any array of ours, or another way of unpacking, before anything is read of it."""
    item = max(1, array.dtype.itemsize)
    chunk = math.prod(array.chunks) * item
    whole = math.prod(array.shape) * item if array.ndim == 1 else 0  # coordinates are read whole
    if max(chunk, whole) > LARGEST:
        raise InputError(
            f"{where} has the shape {array.shape} in chunks of {array.chunks}, {max(chunk, whole):,} bytes at a time; the store is damaged"
        )
    codecs = {type(codec).__name__ for codec in getattr(array.metadata, "codecs", ())}
    if not codecs <= CODECS:
        raise InputError(f"{where} is packed with {', '.join(sorted(codecs - CODECS))}; it was not written by tda, or is damaged")


def _dtype_name(dtype: np.dtype[Any]) -> str:
    return "str" if dtype.kind in "TU" else dtype.name
