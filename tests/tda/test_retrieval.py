"""Which documents are near: BM25 against its formula, embeddings against the encoder alone, neighbours against all cosines."""

import json
import logging
import math
import tracemalloc

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from tda.errors import InputError
from tda.retrieval import embedding
from tda.retrieval.bm25 import bm25_nearest, bm25_scores
from tda.retrieval.embedding import embed, encoder_digest, nearest
from tests.tda import language_models as tiny

DOCUMENTS = ("The cat eats, the cat sees fish.", "A dog!", "fish fish; today?", "again")


@pytest.fixture
def encoder(tmp_path):
    return save_encoder(tmp_path / "encoder")


def save_encoder(folder, *, pooling=None, **options):
    tiny.drawn(BertModel, tiny.CONFIGS["BERT"]).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    if pooling is not None:
        names = ("Transformer", "Pooling", "Normalize")
        parts = [
            {"path": path, "type": f"sentence_transformers.models.{name}"} for path, name in zip(("", "1_Pooling", "2"), names, strict=True)
        ]
        (folder / "modules.json").write_text(json.dumps(parts))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if options:
        (folder / "sentence_bert_config.json").write_text(json.dumps(options))
    return folder


def alone(folder, text, pool):
    """One text's embedding by the model itself, without a batch or padding."""
    model = BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        vector = pool(model(torch.tensor([tiny.ids_of(text)])).last_hidden_state[0])
    return (vector / vector.norm()).numpy()


def test_bm25_is_its_formula():
    queries = ("fish? the FISH", "dog", "elephant")
    corpus = [["the", "cat", "eats", "the", "cat", "sees", "fish"], ["a", "dog"], ["fish", "fish", "today"], ["again"]]
    length = sum(map(len, corpus)) / len(corpus)

    def weight(word, document):
        have = sum(word in other for other in corpus)
        count = document.count(word)
        rarity = math.log(1 + (len(corpus) - have + 0.5) / (have + 0.5))
        return rarity * count / (count + 1.5 * (0.25 + 0.75 * len(document) / length))

    asked = (["fish", "the", "fish"], ["dog"], ["elephant"])
    truth = np.array([[sum(weight(word, document) for word in query) for document in corpus] for query in asked])
    found = bm25_scores(queries, DOCUMENTS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, truth, rtol=1e-6)


def test_bm25_ranks_what_shares_a_word_and_nothing_else():
    ids, scores = bm25_nearest(("fish", "elephant", "the dog"), DOCUMENTS, 3)
    assert ids.tolist() == [[2, 0, -1], [-1, -1, -1], [1, 0, -1]]
    assert scores.dtype == np.float32
    assert (scores[ids >= 0] > 0).all()
    assert (scores[ids < 0] == 0).all()


def test_documents_without_a_word_are_refused():
    with pytest.raises(InputError, match="none of the 2 documents has a word"):
        bm25_scores(["a"], ["...", "--"])


def test_a_plain_encoder_is_averaged_over_tokens_whatever_its_batch_mates(encoder):
    found = embed(tiny.TEXTS, encoder, batch_size=2)
    assert found.dtype == np.float32
    for text, vector in zip(tiny.TEXTS, found, strict=True):
        np.testing.assert_allclose(vector, alone(encoder, text, lambda hidden: hidden.mean(0)), atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "pool"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda hidden: hidden[0]),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, lambda hidden: hidden.amax(0)),
        ({"pooling_mode": "lasttoken"}, lambda hidden: hidden[-1]),
        ({"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}, lambda hidden: hidden.mean(0)),
    ],
)
def test_pooling_is_that_of_the_folder(tmp_path, pooling, pool):
    folder = save_encoder(tmp_path / "encoder", pooling=pooling)
    for text, vector in zip(tiny.TEXTS, embed(tiny.TEXTS, folder), strict=True):
        np.testing.assert_allclose(vector, alone(folder, text, pool), atol=1e-6)


def test_texts_are_cut_and_lowered_as_the_folder_says(tmp_path):
    folder = save_encoder(tmp_path / "encoder", max_seq_length=3, do_lower_case=True)
    found = embed(["THE cat Eats fish"], folder)
    np.testing.assert_allclose(found[0], alone(folder, "the cat eats", lambda hidden: hidden.mean(0)), atol=1e-6)


def test_neighbours_are_those_of_all_cosines_whatever_the_block(monkeypatch):
    generator = np.random.default_rng(0)
    queries, documents = (generator.normal(size=(n, 6)).astype(np.float32) for n in (4, 50))
    unit = [array / np.linalg.norm(array, axis=1, keepdims=True) for array in (queries, documents)]
    truth = np.argsort(-(unit[0] @ unit[1].T), axis=1)[:, :7]
    for block in (7, 20, 1000):
        monkeypatch.setattr(embedding, "BLOCK", block)
        ids, cosines = nearest(queries, documents, 7)
        assert ids.tolist() == truth.tolist()
        np.testing.assert_allclose(cosines, np.take_along_axis(unit[0] @ unit[1].T, truth, 1), atol=1e-6)


def test_documents_of_one_cosine_come_by_id_also_at_the_last_places(monkeypatch):
    generator = np.random.default_rng(0)
    kinds = generator.normal(size=(4, 384)).astype(np.float32)
    documents = np.concatenate([np.repeat(kinds, 150, 0), generator.normal(size=(37, 384)).astype(np.float32)])
    documents = documents[generator.permutation(len(documents))]
    queries = np.concatenate([kinds, generator.normal(size=(3, 384)).astype(np.float32)])
    for block in (100, 1000):
        monkeypatch.setattr(embedding, "BLOCK", block)
        ids, cosines = nearest(queries, documents, 40)
        for kind, row in zip(kinds, ids, strict=False):
            assert row.tolist() == np.flatnonzero((documents == kind).all(1))[:40].tolist()
        assert (cosines[:4] == cosines[:4, :1]).all()
        assert (np.diff(cosines) <= 0).all()


def test_memory_does_not_grow_with_the_queries(monkeypatch):
    monkeypatch.setattr(embedding, "WORKING_MIB", 1)
    generator = np.random.default_rng(0)
    queries, documents = (generator.normal(size=(n, 4)).astype(np.float32) for n in (4000, 1000))
    nearest(queries[:2], documents, 3)  # imports
    tracemalloc.start()
    try:
        ids, _ = nearest(queries, documents, 3)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ids.shape == (4000, 3)
    assert most < 8 << 20, "a quarter of all distances"


def test_a_digest_follows_the_weights_and_the_pooling(tmp_path):
    folder = save_encoder(tmp_path / "encoder", pooling={"pooling_mode_mean_tokens": True})
    seen = {encoder_digest(str(folder))}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    seen.add(encoder_digest(str(folder)))
    tiny.drawn(BertModel, tiny.CONFIGS["BERT"], seed=1).save_pretrained(folder)
    assert len(seen | {encoder_digest(str(folder))}) == 3


def broken(folder, what):
    if what == "config":
        (folder / "config.json").unlink()
    elif what == "weights":
        (folder / "model.safetensors").unlink()
    elif what == "tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif what == "part":
        (folder / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]')
    elif what == "pooling":
        (folder / "modules.json").write_text('[{"type": "models.Pooling", "path": "1"}]')
    elif what == "json":
        (folder / "modules.json").write_text("{")
    elif what == "layers":
        BertConfig(**{**tiny.CONFIGS["BERT"].to_dict(), "num_hidden_layers": 2}).save_pretrained(folder)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("config", "has no config.json"),
        ("weights", "holds no model.safetensors"),
        ("tokenizer", "neither tokenizer_config.json nor tokenizer.json"),
        ("part", "names a part 'Dense'; known are"),
        ("pooling", "asks for no pooling"),
        ("json", "modules.json cannot be read"),
        ("layers", "lacks weights of its BertModel: encoder.layer.1"),
    ],
)
def test_a_folder_that_is_no_encoder_is_refused(encoder, what, said):
    broken(encoder, what)
    with pytest.raises(InputError, match=said) as told:
        embed(tiny.TEXTS, encoder)
    assert "\n" not in str(told.value)


def test_a_text_without_a_token_is_refused(encoder):
    with pytest.raises(InputError, match=r"text 1 \(' '\) has no token"):
        embed(["the cat", " "], encoder)


def test_what_bm25_is_told_to_say_of_its_work_is_not_passed_on(caplog):
    with caplog.at_level(logging.DEBUG, "bm25s"):
        bm25_nearest(["a cat"], ["the cat", "a dog"], 1)
    assert not caplog.records
