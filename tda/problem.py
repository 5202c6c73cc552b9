"""What is attributed: a model, its training data and the queries, as one class that a user writes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tda.checkpoint import fill
from tda.device import CPU
from tda.errors import InputError, cause
from tda.likelihoods import Likelihood
from tda.recipe import Recipe, train
from tda.sources import check_current, sources

Split = Literal["train", "query"]


class Batch(NamedTuple):
    """Collated examples: `inputs` as the dataset yields them with a batch axis in front, `targets` likewise."""

    inputs: Any
    targets: Tensor


class Problem(ABC):
    """A model, its data and its likelihood. Datasets are map-style: dataset[i] -> (inputs, targets), and i is the example's id."""

    likelihood: ClassVar[Likelihood]
    #: Which direction of the measurement is good news: decides what "helpful" means.
    better: Literal["lower", "higher"] = "lower"
    #: (train,) bool: which training labels are known to be wrong; None where nothing is known. An evaluation asks how well they are found.
    mislabelled: Any = None
    #: Names of options that are paths: a run's configuration takes them from its own folder.
    paths: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def model(self) -> nn.Module:
        """The architecture; its weights come from the checkpoint. Its floating dtype is the dtype of the run."""

    @abstractmethod
    def train_data(self) -> Any:
        """The training set, map-style."""

    @abstractmethod
    def query_data(self) -> Any:
        """The queries, map-style."""

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """Outputs (batch, classes) or (batch, tokens, vocabulary); by default model(inputs), model(**inputs) for a dict of inputs."""
        outputs: Tensor = model(**batch.inputs) if isinstance(batch.inputs, dict) else model(batch.inputs)
        return outputs

    def measurement(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """f_q per query, shape (batch,): the loss unless overridden (then say `better = "higher"` where more is better)."""
        return self.likelihood.loss(outputs, targets)

    def mask(self, batch: Batch) -> Tensor | None:
        """(batch, tokens) boolean, True at real positions; None: all are real. By default a dict's `attention_mask`."""
        if isinstance(batch.inputs, dict) and "attention_mask" in batch.inputs:
            found: Tensor = batch.inputs["attention_mask"].bool()
            return found
        return None

    def restore(self, model: nn.Module, state: dict[str, Tensor], where: str) -> None:
        """Load a checkpoint's tensors into `model`, as `model()` gave it, in place. By default names must be the model's.

        Raises InputError where they do not fit.
        """
        fill(model, state, where)

    def lengths(self, split: Split) -> Sequence[int] | None:
        """Tokens of every example of a split, where examples are sequences of different lengths: batches are then cut by length.

        None, the default: batches have a fixed number of examples, in order.
        """
        return None

    def groups(self, model: nn.Module) -> Mapping[str, Sequence[str]]:
        """Names of modules by a word that stands for all of them in `modules` and `exclude`, such as "mlp"; none by default."""
        return {}

    def notes(self) -> Sequence[str]:
        """What a reader of the scores should know of the data: shown with a run's notes."""
        return ()

    @classmethod
    def content(cls, options: Mapping[str, Any]) -> str:  # noqa: ARG003
        """What counts in files that the options name, beside weights and data: a digest. What differs in it shares no artifact."""
        return ""

    def recipe(self) -> Recipe | None:
        """How `fit` trains where the problem does not define its own; many models are then retrained at once. None: not said."""
        return None

    def fit(self, model: nn.Module, dataset: Any, *, seed: int, on_checkpoint: Callable[..., None]) -> None:
        """Train `model` in place; only needed where no checkpoint is given, or for retraining. By default as the recipe says."""
        recipe = self.recipe()
        if recipe is not None:
            train(self, recipe, model, dataset, seed=seed, on_checkpoint=on_checkpoint)
            return
        raise InputError(f"{type(self).__name__} has no fit(model, dataset, *, seed, on_checkpoint): give a checkpoint or define it")

    def collate(self, examples: list[Any]) -> Any:
        """A list of dataset items -> (inputs, targets) with a batch axis; torch's default collation."""
        return torch.utils.data.default_collate(examples)

    def describe(self, split: Split, i: int) -> Any:
        """Text, image array or dict that shows example i of a split in reports; by default its inputs."""
        data = self.train_data() if split == "train" else self.query_data()
        return data[i][0]

    def text(self, split: Split, i: int) -> str | None:
        """What example i of a split says, by which candidates for scoring are found; None: it is no text.

        By default its description, where that is text, or a dict of texts, which are joined.
        """
        shown = self.describe(split, i)
        parts = list(shown.values()) if isinstance(shown, Mapping) else [shown]
        return " ".join(parts) if parts and all(isinstance(part, str) for part in parts) else None

    def gold(self, query: int) -> Sequence[int] | None:
        """Ids of the training examples that are known to be behind a query, to be scored in any case; None: nothing is known.

        Of the training set that candidates are taken from, which may be an earlier stage's.
        """
        return None

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Texts of tokens by their places in the vocabulary, for reports that show the influence of each; by default the places."""
        return [str(i) for i in ids]


def can_fit(problem: Problem) -> bool:
    """Whether the problem says how to train: by its own `fit`, or by a recipe."""
    return type(problem).fit is not Problem.fit or problem.recipe() is not None


def training_device(problem: Problem, device: torch.device) -> torch.device:
    """Where the model lies that `fit` is given: by a recipe it is trained on the device; a `fit` of the user's own moves it as it likes."""
    return device if type(problem).fit is Problem.fit else CPU


def measurement_of(problem: Problem) -> dict[str, str]:
    """Name of the measurement and the direction that is good news, as stored with a run."""
    own = getattr(problem.measurement, "__func__", None) is not Problem.measurement
    return {"name": getattr(problem.measurement, "__name__", "measurement") if own else "loss", "better": problem.better}


def load_problem(spec: str, options: dict[str, Any] | None = None) -> Problem:
    """The problem named "package.module:Class" or "path/to/file.py:Class", built with `options` as keyword arguments.

    Raises InputError where the import fails, the class is absent or lacks a required method, or the options do not fit.
    """
    kind = _problem_class(spec)
    missing = sorted(getattr(kind, "__abstractmethods__", ()))
    if missing:
        names = ", ".join(missing)
        raise InputError(f"problem {spec!r}: {kind.__name__} lacks the required method{'s' * (len(missing) > 1)} {names}; define {names}")
    if not hasattr(kind, "likelihood"):
        raise InputError(f"problem {spec!r}: {kind.__name__} has no `likelihood`; add e.g. likelihood = tda.Categorical()")
    stated: Any = kind  # a user's class may hold anything
    if inspect.isclass(stated.likelihood):
        name = stated.likelihood.__name__
        raise InputError(f"problem {spec!r}: {kind.__name__}.likelihood is the class {name}; write likelihood = {name}()")
    if stated.better not in ("lower", "higher"):
        raise InputError(f'problem {spec!r}: {kind.__name__}.better is {stated.better!r}; write "lower" or "higher"')
    try:
        inspect.signature(kind).bind(**(options or {}))
    except TypeError as error:
        raise InputError(f"problem {spec!r}: [problem_options] do not fit {kind.__name__}{inspect.signature(kind)}: {error}") from error
    try:
        return kind(**(options or {}))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"problem {spec!r}: {kind.__name__}(...) with its [problem_options] failed: {cause(error)}") from error


def import_problem(spec: str) -> ModuleType:
    """The module of a problem named "package.module:Class" or "path/to/file.py:Class".

    Raises InputError where the import fails, or where its source, or one that it imports, was edited since this process imported it.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise InputError(f'problem {spec!r} must be "package.module:Class" or "path/to/file.py:Class"')
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except InputError:
        raise
    except Exception as error:  # whatever the user's module raises at import is the user's to see, in one line
        raise InputError(f"problem {spec!r}: importing {place} failed: {cause(error)}") from error
    check_current(module)
    return module


def _problem_class(spec: str) -> type[Problem]:
    module = import_problem(spec)
    place, _, name = spec.rpartition(":")
    kind = getattr(module, name, None)
    if kind is None:
        known = [k for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, Problem) and v is not Problem]
        raise InputError(f"problem {spec!r}: {place} has no class {name}; it has {', '.join(known) or 'no Problem class'}")
    if not (inspect.isclass(kind) and issubclass(kind, Problem)):
        raise InputError(f"problem {spec!r}: {name} is not a subclass of tda.Problem")
    return kind


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"problem file {path} does not exist; paths are taken from the config file's folder")
    # A name made from path and content: files of one name, or a file before and after an edit, must not share an entry, and pickled
    # references must resolve again.
    name = "tda_problem_" + hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"problem file {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def problem_digest(spec: str, options: dict[str, Any]) -> str:
    """sha256 of what determines a problem's computations.

    Its name, its options and the content of files that they name, the sources of its module and of all the user's modules that it
    imports, and the versions of tda and torch.
    """
    texts = {name: hashlib.sha256(text).hexdigest() for name, text in sources(import_problem(spec)).items()}
    versions = [version("tda"), torch.__version__]
    kind = getattr(import_problem(spec), spec.rpartition(":")[2], Problem)
    content = [found] if (found := kind.content(options)) else []
    return hashlib.sha256(json.dumps([spec.rpartition(":")[2], options, versions, texts, *content], sort_keys=True).encode()).hexdigest()
