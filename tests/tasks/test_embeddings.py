"""Embeddings of a split are made in shards, once, by the encoder that the run was planned with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import BertModel

from tasks import candidates
from tasks.candidates import EmbeddingJob
from tasks.subject import Subject
from tda import location
from tda.errors import InputError
from tda.retrieval.embedding import embed, encoder_digest
from tests.flows.runs import objects, write_config
from tests.tasks.test_sparse import CONFIG, SPOKEN
from tests.tda import language_models as tiny

TEXTS = [f"a{i % 3} b{i % 5} c{i % 7}" for i in range(23)]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EmbeddingJob:
    monkeypatch.setattr(candidates, "TEXTS", 4)
    write_config(tmp_path / "config", CONFIG, SPOKEN)
    tiny.drawn(BertModel, tiny.CONFIGS["BERT"]).save_pretrained(tmp_path / "encoder")
    tiny.save_tokenizer(tmp_path / "encoder", ["<pad>", "<unk>", "<end>", *(f"{w}{i}" for w in "abc" for i in range(3))])
    folder = f"file://{tmp_path}/encoder"
    subject = Subject(f"{tmp_path}/config/tiny.py:Spoken", "{}", "", ("*",), (), "auto")
    return EmbeddingJob(f"file://{tmp_path}/embeddings", subject, "train", folder, encoder_digest(folder), 23)


def made(job: EmbeddingJob, order: int = 1) -> np.ndarray:
    candidates.create_embeddings(job)
    for part in list(range(len(job.parts)))[::order]:
        candidates.embed_part((job, part))
    candidates.finish_embeddings(job)
    return location.open_group(job.zarr)["embedding"][...]


def test_shards_in_any_order_hold_the_embedding_of_every_text(job: EmbeddingJob) -> None:
    found = made(job)
    assert len(job.parts) == 6
    np.testing.assert_allclose(found, embed(TEXTS, job.folder), atol=1e-6)
    other = replace(job, url=job.url + "-backwards")
    made(other, order=-1)
    assert objects(job.zarr) == objects(other.zarr)


def test_what_is_embedded_is_not_embedded_again_and_what_is_damaged_is(job: EmbeddingJob) -> None:
    whole = made(job)
    assert candidates.embed_part((job, 2)) == {"seconds": 0.0}
    Path(job.zarr.removeprefix("file://"), "embedding", "c", "2", "0").unlink()
    with pytest.raises(ArithmeticError, match=r"embeddings of train examples 8\.\.11: a value is missing"):
        candidates.finish_embeddings(job)
    assert np.array_equal(made(job), whole)


def test_an_encoder_that_is_replaced_meanwhile_is_told(job: EmbeddingJob) -> None:
    candidates.create_embeddings(job)
    tiny.drawn(BertModel, tiny.CONFIGS["BERT"], seed=1).save_pretrained(job.folder.removeprefix("file://"))
    with pytest.raises(InputError, match="was replaced while the run was under way"):
        candidates.embed_part((job, 0))
