"""What the [evaluation] table says about fact tracing; the rest of it is shared with, or belongs to, the evaluation by retraining."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

#: Keys of evaluation by retraining, which fact tracing has no use for.
RETRAINING = ("alphas", "subsets", "leave_one_out", "removal", "removal_queries", "retrainings", "randomised")
At = Literal["finetuned", "pretrained"]


class TracingOptions(BaseModel):
    """Keys that hold with kind = "tracing" alone."""

    kind: Literal["retraining", "tracing"] = "retraining"
    at: Annotated[list[At], Field(min_length=1)] = ["finetuned", "pretrained"]
    """At which of the two checkpoints methods that know one stage score the pre-training set."""
    bm25: bool = True
    """Compare with the documents that share rare words with the query, too."""
    embedding: Annotated[str, Field(min_length=1)] | None = None
    """A local folder of a sentence encoder to compare with."""

    @model_validator(mode="after")
    def _keys_suit_the_kind(self) -> Self:
        tracing = self.kind == "tracing"
        for name in RETRAINING if tracing else TRACING:
            if name in type(self).model_fields and getattr(self, name) != type(self).model_fields[name].default:
                other = "retraining" if tracing else "tracing"
                raise ValueError(f'evaluation.{name} is for kind = "{other}", and kind is "{self.kind}"; leave it out')
        if len(set(self.at)) < len(self.at):
            raise ValueError(f"evaluation.at = {self.at} names a checkpoint twice; leave one of them out")
        return self

    def retraining(self) -> dict[str, Any]:
        """The table as evaluation by retraining stores it."""
        return self.model_dump(exclude={"kind", *TRACING})


TRACING = tuple(name for name in TracingOptions.model_fields if name != "kind")
