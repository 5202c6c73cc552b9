"""Fact tracing by what takes no gradients: chains, and sentence embeddings of the question with and without its answer."""

from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig, BertModel

import tda
from flows.config import load_config
from flows.trace import trace_run
from tda import location
from tda.evaluation.tracing import first_ranks
from tda.problems.facts import FactCorpus, FactQuestions
from tda.retrieval.embedding import embed
from tests.tda import language_models as tiny

SIZE = "persons = 3, countries = 1, objects = 5, paraphrases = 2, distractors = 1, width = 16, depth = 1, heads = 2"
OPTIONS = {"persons": 3, "countries": 1, "objects": 5, "paraphrases": 2, "distractors": 1, "width": 16, "depth": 1, "heads": 2}
CHAINS = "damping = 1.0\nchains = 2\ndraws = 16\nburn_in = 8\nthinning = 1\nbatch_size = 8\nsegment = 8\n"
CONFIG = f"""
problem = "tda.problems.facts:FactQuestions"
problem_options = {{ {SIZE}, epochs = 1 }}
modules = ["mlp"]
[[methods]]
name = "multistage"
proximity = 0.3
[methods.pretraining]
problem = "tda.problems.facts:FactCorpus"
problem_options = {{ {SIZE}, epochs = 1 }}
damping = 1e-3
[[methods]]
name = "bif"
{CHAINS}
[[methods]]
name = "bif"
label = "correlation"
normalized = true
{CHAINS}
[evaluation]
kind = "tracing"
seeds = 1
tuning_queries = 0.25
embedding = "encoder"
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, single: str):
    """The folder of the configuration, the summary of the evaluation, and what it stored."""
    folder = tmp_path_factory.mktemp("facts")
    words = ("<pad>", "<unk>", "<end>", *FactCorpus(**OPTIONS).world.words)
    config = BertConfig(**{**tiny.CONFIGS["BERT"].to_dict(), "vocab_size": len(words), "max_position_embeddings": 32})
    tiny.drawn(BertModel, config).save_pretrained(folder / "encoder")
    tiny.save_tokenizer(folder / "encoder", words)
    (folder / "facts.toml").write_text(CONFIG)
    summary = trace_run(load_config(folder / "facts.toml", [single], f"file:{folder}/store"))
    return folder, summary, tda.open_run(f"file:{folder}/store", summary.run_id).evaluation.load()


def test_a_sentence_encoder_ranks_by_its_cosines(done) -> None:
    folder, _, data = done
    problem, corpus = FactQuestions(**OPTIONS), FactCorpus(**OPTIONS)
    gold = [np.array(problem.gold(q)) for q in range(data.sizes["query"])]
    shown = [problem.describe("query", q) for q in range(len(gold))]
    documents = embed([corpus.describe("train", i) for i in range(len(corpus.train_data()))], folder / "encoder")
    asked = {"embedding": [each["prompt"] for each in shown], "embedding-with-answer": [" ".join(each.values()) for each in shown]}
    for label, texts in asked.items():
        ranks = first_ranks(embed(texts, folder / "encoder") @ documents.T, gold)
        np.testing.assert_array_equal(data["gold_rank"].sel({"method": label})[0], ranks)
    assert not data["gold_rank"].sel({"method": "embedding"}).equals(data["gold_rank"].sel({"method": "embedding-with-answer"}))


def test_chains_rank_by_the_scores_of_their_runs_which_tell_of_the_chains(done) -> None:
    folder, summary, data = done
    gold = [np.array(FactQuestions(**OPTIONS).gold(q)) for q in range(data.sizes["query"])]
    for title in ("bif", "correlation"):
        for at in ("finetuned", "pretrained"):
            (run_id,) = data.attrs["runs"][f"{title}, {at}"]
            run = tda.open_run(f"file:{folder}/store", run_id)
            scores = run.influence.sel(method=title).to_numpy()
            assert np.abs(scores).max() > 0
            np.testing.assert_array_equal(data["gold_rank"].sel({"method": f"{title}, {at}"})[0], first_ranks(-scores, gold))
            page = Path(f"{run.url.removeprefix('file://')}/report.html").read_text()
            assert page.count("<strong>Loss of the batches") == 2, "one chart for each method that samples"
            assert "16 draws" in page
    page = location.read_bytes(location.join(summary.url, "report.html")).decode()
    assert all(f"{family}<" in page for family in ("bif, finetuned", "correlation, pretrained", "embedding-with-answer"))
