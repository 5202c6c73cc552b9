"""Models and tokenizers in folders on a disk, as transformers save them.

Nothing is downloaded, no code of a folder runs, no pickle is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tda import location
from tda.checkpoint import listed
from tda.errors import InputError, cause

#: Architectures whose positions begin behind the padding token's.
OFFSET = {"roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "data2vec-text"}


@contextmanager
def quiet() -> Iterator[Any]:
    """transformers, without its progress bars and reports. Raises InputError where it is not installed."""
    try:
        import transformers
        from transformers.utils import logging
    except ImportError as error:
        raise InputError("language models need transformers; pip install 'tda[language]'") from error
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def local(url: str, option: str) -> Path:
    """The folder of an option. Raises InputError where it is not on a disk or does not exist."""
    where = location.resolve(url)
    path = Path(where.removeprefix("file://"))
    if not where.startswith("file:") or not path.is_dir():
        said = "is no folder" if where.startswith("file:") else "is not on a disk, where transformers look"
        raise InputError(f"{option} {where} {said}; give a local folder with config.json")
    return path


def read_config(folder: Path) -> Any:
    """The configuration of a model. Raises InputError where there is none, or none that transformers know without running its code."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise InputError(
                f"checkpoint {folder} is a PEFT adapter without its base{_base(folder)}; "
                "give the base's folder as `checkpoint` and this one as `adapter`"
            )
        raise InputError(f"checkpoint {folder} has no config.json; give a folder as transformers' save_pretrained writes it")
    with quiet() as transformers:
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise InputError(f"checkpoint {folder}: config.json is of no architecture that can be read ({cause(error)})") from error
    config.use_cache = False
    return config


def _base(folder: Path) -> str:
    name = location.read_json(f"file://{folder.absolute()}/adapter_config.json").get("base_model_name_or_path")
    return f" {name!r}" if name else ""


def read_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a folder: tokenizer_config.json as transformers save it, or tokenizer.json alone. Raises InputError."""
    with quiet() as transformers:
        try:
            if (folder / "tokenizer_config.json").is_file():
                return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if (folder / "tokenizer.json").is_file():
                return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        except Exception as error:
            raise InputError(f"tokenizer {folder} cannot be read: {cause(error)}") from error
    raise InputError(f"tokenizer {folder} has neither tokenizer_config.json nor tokenizer.json; give the folder of a fast tokenizer")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds one."""
    return any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))


def check_vocabulary(tokenizer: Any, config: Any, folder: Path) -> None:
    """Raise InputError where the tokenizer has tokens that the model's embedding has not."""
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if last >= vocabulary(config):
        raise InputError(
            f"tokenizer {folder} has tokens up to {last} ({token!r}), and the model's embedding has 0..{vocabulary(config) - 1}; "
            "give the tokenizer that the model was trained with"
        )


def vocabulary(config: Any) -> int:
    """Rows of the embedding of tokens."""
    return int(config.vocab_size)


def positions(config: Any) -> int | None:
    """How many tokens the model takes; None where it has no limit."""
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    return int(most) - (int(config.pad_token_id) + 1 if config.model_type in OFFSET else 0)


def fresh(kind: str, config: Any) -> nn.Module:
    """A model with weights drawn from torch's generator; kind: "AutoModelForCausalLM" or another of transformers' classes.

    float32. Attention is written out in matrix products, which have second derivatives. Raises InputError.
    """
    with quiet() as transformers:
        try:
            model = getattr(transformers, kind).from_config(
                copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
        except Exception as error:
            raise InputError(f"a {config.model_type} cannot be built by {kind}: {cause(error)}") from error
    found: nn.Module = model.eval()
    return found


def filled(kind: str, config: Any, state: Mapping[str, Tensor], where: str, may_lack: frozenset[str] | None = frozenset()) -> nn.Module:
    """A model with the weights of a folder, whose names may be those of another head, or an older version's, as transformers allow.

    may_lack: names that stay as they are drawn where `state` has none; None: whatever lies outside of the base model, a head.
    Raises InputError with the names that are missing, unknown or of another shape.
    """
    with torch.device("meta"):
        model_class: Any = type(fresh(kind, config))
    with quiet():
        try:
            model, told = model_class.from_pretrained(
                None, config=copy.deepcopy(config), state_dict=dict(state), output_loading_info=True, ignore_mismatched_sizes=True,
                dtype=torch.float32, attn_implementation="eager",
            )  # fmt: skip
        except Exception as error:
            raise InputError(f"checkpoint {where} cannot be loaded as {model_class.__name__}: {cause(error)}") from error
    base = f"{model.base_model_prefix}."

    def matters(name: str) -> bool:
        return name.startswith(base) if may_lack is None else name not in may_lack

    missing = sorted(name for name in told["missing_keys"] if matters(name))
    unknown = sorted(name for name in told["unexpected_keys"] if may_lack is not None or name.startswith(base))
    shapes = sorted(f"{name} {tuple(a)} instead of {tuple(b)}" for name, a, b in told["mismatched_keys"])
    found = [("missing", missing), ("unknown", unknown), ("of another shape", shapes)]
    if any(names for _, names in found):
        said = "; ".join(f"{what}: {listed(names)}" for what, names in found if names)
        raise InputError(f"checkpoint {where} does not fit {model_class.__name__}: {said}; give the checkpoint of this architecture")
    result: nn.Module = model.eval()
    return result
