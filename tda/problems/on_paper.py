"""Models that exist on paper only, so that `tda plan` says what attributing them would take. See docs/plan.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tda
from tda.language import groups
from tda.modules import chosen_parameters
from tda.shapes import Shapes, on_paper

#: How to leave it.
_WAY_OUT = "a problem of tda.problems.on_paper has no weights and no data: `tda plan` alone takes it"


class CausalLM(tda.Problem):
    """A causal language model by the keys of a config.json of transformers (`model`), on sequences of equal length.

    examples: training sequences. tokens: of each. queries: sequences whose behaviour is attributed.
    """

    likelihood = tda.TokenCategorical()

    def __init__(self, model: dict[str, Any], examples: int, tokens: int, queries: int) -> None:
        for name, number in {"examples": examples, "tokens": tokens, "queries": queries}.items():
            if number < 1:
                raise tda.InputError(f"problem_options.{name} must be at least 1, got {number}")
        self.keys, self.examples, self.length, self.queries = dict(model), examples, tokens, queries

    def model(self) -> nn.Module:
        """The architecture, on the meta device."""
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise tda.InputError('models on paper need transformers; install the extra: pip install "tda[language]"') from error
        keys = dict(self.keys)
        try:
            config = AutoConfig.for_model(keys.pop("model_type"), **keys)
            with torch.device("meta"):
                made: nn.Module = AutoModelForCausalLM.from_config(config)
        except (KeyError, ValueError, TypeError) as error:
            raise tda.InputError(f"problem_options.model is no model of transformers: {type(error).__name__}: {error}") from error
        return made.float()

    def groups(self, model: nn.Module) -> Mapping[str, Sequence[str]]:
        """The MLPs as "mlp", the attention as "attention"."""
        return {part: names for part, names in groups.groups(model).items() if names}

    def shapes(self, modules: Sequence[str], exclude: Sequence[str]) -> Shapes:
        """Of the model at so many tokens, with the layers that these patterns choose."""
        model = self.model()
        chosen = chosen_parameters(self, model, modules=modules, exclude=exclude)
        vocabulary = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
        return on_paper(model, self.length, self.length * vocabulary, chosen)

    def train_data(self) -> Any:
        """As many examples as there are; none can be read."""
        return _Unreadable(self.examples)

    def query_data(self) -> Any:
        """Likewise."""
        return _Unreadable(self.queries)

    def predict(self, model: nn.Module, batch: tda.Batch) -> Tensor:
        """Nothing is predicted on paper."""
        raise tda.InputError(_WAY_OUT)


class _Unreadable:
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        raise tda.InputError(_WAY_OUT)
