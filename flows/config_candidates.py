"""The [candidates] table of a run's configuration: which training examples are scored, per query."""

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]


class CandidatesConfig(BaseModel):
    """Counts are per query; what several sources name is scored once."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    on: Text = "train"
    """The training set: the run's own, or a stage of multistage such as "pretraining"."""
    bm25: Count = 0
    """So many that share words with the query."""
    embedding: Count = 0
    """So many that are nearest by a sentence embedding."""
    model: Text | None = None
    """The folder of the encoder, as sentence-transformers or transformers save it."""
    gold: bool = False
    """Whether those are added that problem.gold(query) names."""
    random: Count = 0
    """So many drawn at random, by the run's seed."""

    @model_validator(mode="after")
    def _something_is_asked(self) -> Self:
        if not (self.bm25 or self.embedding or self.gold or self.random):
            raise ValueError(
                "candidates asks for none: set bm25, embedding, gold or random, or leave the table out to score every training example"
            )
        if self.embedding and self.model is None:
            raise ValueError(f'candidates.embedding = {self.embedding} needs candidates.model; add model = "folder of an encoder"')
        if self.model is not None and not self.embedding:
            raise ValueError(f'candidates.model = "{self.model}" is used only with candidates.embedding; set it or remove the model')
        return self

    def placed(self, folder: Path) -> Self:
        """With the model's folder taken from that of the configuration."""
        from tda.location import resolve

        return self if self.model is None else self.model_copy(update={"model": resolve(self.model, folder)})
