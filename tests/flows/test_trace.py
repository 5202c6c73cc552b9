"""Fact tracing from its file to its page: ranks that can be recomputed from the runs, reused as a whole, refused in one line."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertModel

import tda
from flows import attribute, cli
from flows.config import load_config
from flows.trace import trace_run
from tasks.tracing import Tracing
from tda import location
from tda.errors import InputError
from tda.evaluation.subsets import tuning
from tda.evaluation.tracing import expected_at_random
from tda.problems.facts import FactQuestions
from tda.results import Run
from tests.tda import language_models as tiny

SIZE = "persons = 4, countries = 2, objects = 5, paraphrases = 2, distractors = 1, width = 16, depth = 1, heads = 2"
CONFIG = f"""
problem = "tda.problems.facts:FactQuestions"
problem_options = {{ {SIZE}, epochs = 3 }}
modules = ["mlp"]
[[methods]]
name = "multistage"
proximity = 0.3
[methods.pretraining]
problem = "tda.problems.facts:FactCorpus"
problem_options = {{ {SIZE}, epochs = 2 }}
damping = [1e-6, 1e-1]
[[methods]]
name = "ekfac"
damping = 1e-3
[[methods]]
name = "random"
[evaluation]
kind = "tracing"
seeds = 2
"""
OPTIONS = {"persons": 4, "countries": 2, "objects": 5, "paraphrases": 2, "distractors": 1, "width": 16, "depth": 1, "heads": 2}
LABELS = ["multistage-1e-06", "multistage-0.1", "ekfac, finetuned", "random", "ekfac, pretrained", "bm25", "bm25-with-answer"]


def written(folder: Path, text: str = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "facts.toml").write_text(text)
    return folder / "facts.toml"


def traced(file: Path, store: str, *overrides: str):
    """Evaluate in this process: (summary, the run's evaluation)."""
    summary = trace_run(load_config(file, overrides, store), "tda evaluate facts.toml")
    return summary, tda.open_run(store, summary.run_id).evaluation.load()


@pytest.fixture(scope="module")
def narrower(tmp_path_factory, single):
    """The evaluation of one training: (folder, store, summary, the run's evaluation)."""
    folder = tmp_path_factory.mktemp("facts")
    store = f"file:{folder}/store"
    return folder, store, *traced(written(folder), store, single, "evaluation.seeds=1")


@pytest.fixture(scope="module")
def done(narrower, single):
    """The same of two trainings, in the same store."""
    folder, store, *_ = narrower
    return folder, store, *traced(folder / "facts.toml", store, single)


def test_ranks_are_those_of_the_runs_scores(done):
    _, store, _, data = done
    assert data["method"].values.tolist() == LABELS
    problem = FactQuestions(**OPTIONS)
    ids = [problem.gold(q) for q in range(data.sizes["query"])]
    for label, stage, title in [("multistage-0.1", True, "multistage-0.1"), ("ekfac, pretrained", False, "ekfac")]:
        for seed, run_id in enumerate(data.attrs["runs"][label]):
            run = tda.open_run(store, run_id)
            scores = (run.influence_on("pretraining") if stage else run.influence).sel(method=title).to_numpy()
            for q, gold in enumerate(ids):
                order = np.argsort(scores[q]).tolist()  # the most negative lowers the loss most
                assert data["gold_rank"].sel({"method": label})[seed, q] == 1 + min(order.index(i) for i in gold)
                share = np.mean([order.index(i) < 10 for i in gold])
                assert data["gold_recall"].sel({"method": label})[seed, q] == pytest.approx(share)
    assert run.manifest["seeds"]["run"] == 1


def test_the_league_is_of_the_reported_queries_and_the_damping_of_the_others(done):
    _, _, summary, data = done
    some = ~tuning(data.sizes["query"], 0.5, 0)
    assert data["tuning_query"].values.tolist() == (~some).tolist()
    mrr = (1 / data["gold_rank"].values[..., some]).mean((1, 2))
    np.testing.assert_allclose(data["tracing"].sel(metric="mrr", statistic="estimate"), mrr)
    tuned = (1 / data["gold_rank"].values[:2][..., ~some]).mean((1, 2))
    assert data["chosen"].values[:2].tolist() == [tuned[0] >= tuned[1], tuned[0] < tuned[1]]
    assert data["chosen"].values[2:].all()
    gold = [np.array(FactQuestions(**OPTIONS).gold(int(q))) for q in np.flatnonzero(some)]
    assert data.attrs["chance"]["mrr"] == pytest.approx(expected_at_random(gold, data.attrs["documents"])[0])
    with Path(location.join(summary.url, "league.csv").removeprefix("file://")).open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mrr"]) for row in rows] == pytest.approx(sorted(mrr, reverse=True), rel=1e-4)
    assert rows[0].keys() >= {"mrr_low", "recall_high", "mrr_seed_0", "mrr_seed_1", "at"}
    page = location.read_bytes(location.join(summary.url, "report.html")).decode()
    assert "<script" not in page
    assert all(family in page for family in data["family"].values)


def test_single_stage_scores_are_at_the_weights_that_the_chain_was_trained_to(done):
    _, store, _, data = done
    runs = data.attrs["runs"]
    chain = tda.open_run(store, runs["multistage-0.1"][1]).manifest
    pretrained, finetuned = (tda.open_run(store, runs[f"ekfac, {at}"][1]).manifest for at in ("pretrained", "finetuned"))
    assert pretrained["fingerprints"]["checkpoint"] == chain["stages"]["pretraining"]["fingerprints"]["checkpoint"]
    assert finetuned["fingerprints"]["checkpoint"] == chain["fingerprints"]["checkpoint"]
    assert finetuned["fingerprints"]["checkpoint"] != pretrained["fingerprints"]["checkpoint"]
    assert pretrained["problem"] == finetuned["problem"] == "tda.problems.facts:FactCorpus"


def test_a_second_evaluation_takes_all_runs_and_another_training_alone_is_new(narrower, done, single):
    (*_, before, narrow), (folder, store, first, data) = narrower, done
    assert before.reused == []
    assert len(first.reused) == 3
    np.testing.assert_array_equal(data["gold_rank"][:, :1], narrow["gold_rank"])
    again, same = traced(folder / "facts.toml", store, single)
    assert again.url == first.url
    assert again.reused[-1] == "evaluation"
    assert len(again.reused) == 2 * 3 + 1
    assert same.identical(data)


def test_the_command_prints_the_table(done, single, capsys):
    folder, store, *_ = done
    assert cli.status(["evaluate", str(folder / "facts.toml"), "--store", store, "--set", single]) == 0
    printed = capsys.readouterr().out
    assert "Fact tracing: 5 reported queries, 2 trainings" in printed
    assert all(word in printed for word in ("multistage", "(of 2)", "bm25-with-answer", "ekfac, pretrained", "report.html"))


SILENT = """
import tda
from tda.problems.facts import FactCorpus, FactQuestions

class Silent(FactQuestions):
    gold = tda.Problem.gold

class Blank(FactQuestions):
    def gold(self, query):
        return []

class Fewer(FactCorpus):
    def query_data(self):
        return self._asking(self.asked.tolist()[:3])

class Shown(FactCorpus):
    def describe(self, split, i):
        return i
"""


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        (
            [('name = "multistage"\nproximity = 0.3\n', 'name = "graddot"\nlabel = "a"\n'), ("[methods.pretraining]", "[nothing]")],
            'unknown key "nothing"',
        ),
        ([(CONFIG[CONFIG.index("[[methods]]") : CONFIG.index('[[methods]]\nname = "ekfac"')], "")], "needs a method multistage"),
        ([("seeds = 2", "seeds = 2\nalphas = [0.3]")], 'evaluation.alphas is for kind = "retraining", and kind is "tracing"'),
        ([('kind = "tracing"', 'at = ["pretrained"]')], 'evaluation.at is for kind = "tracing", and kind is "retraining"'),
        ([("seeds = 2", 'at = ["pretrained", "pretrained"]')], "names a checkpoint twice"),
        ([("seeds = 2", "tuning_queries = 0")], "leaves nothing to choose a damping of 'multistage' by"),
        ([('name = "random"', 'name = "tracin"')], "'tracin' follows or repeats a training"),
        ([("tda.problems.facts:FactQuestions", "own.py:Silent")], "Silent.gold(0) does not say which documents state what is asked"),
        ([("tda.problems.facts:FactQuestions", "own.py:Blank")], "query 0 has no gold document"),
        ([("tda.problems.facts:FactCorpus", "own.py:Fewer")], "are not those of the fine-tuning"),
        ([("tda.problems.facts:FactCorpus", "own.py:Shown")], "describe('train', 0) is a int, and BM25"),
        ([("modules", "ensemble = 2\nmodules")], "ensemble = 2"),
        ([("seeds = 2", 'embedding = "nowhere"')], "/nowhere is no folder; give a local folder"),
        ([("[evaluation]", '[candidates]\non = "pretraining"\nbm25 = 3\n[evaluation]')], "fact tracing ranks all documents"),
    ],
)
def test_what_cannot_be_traced_is_refused_before_anything_is_written(tmp_path, edits, said):
    text = CONFIG
    for edit in edits:
        assert edit[0] in text
        text = text.replace(*edit, 1)
    (tmp_path / "own.py").write_text(SILENT)
    with pytest.raises(InputError) as error:
        trace_run(load_config(written(tmp_path, text), (), f"file:{tmp_path}/store"))
    assert said in str(error.value)
    assert not (tmp_path / "store").exists()


def test_an_encoder_that_was_replaced_is_another_evaluation(tmp_path):
    tiny.drawn(BertModel, tiny.CONFIGS["BERT"]).save_pretrained(tmp_path / "encoder")
    tiny.save_tokenizer(tmp_path / "encoder")
    corpus, own = ((f"tda.problems.facts:{name}", json.dumps(OPTIONS)) for name in ("FactCorpus", "FactQuestions"))
    options = json.dumps({"seed": 0, "embedding": f"file:{tmp_path}/encoder"})

    def url():
        return Tracing("file:///runs/one", (), (), own, corpus, (0,), options).url

    before = url()
    assert url() == before
    (tmp_path / "encoder").rename(tmp_path / "moved")
    options = options.replace("/encoder", "/moved")
    assert url() == before, "where it lies does not matter"
    (tmp_path / "moved").rename(tmp_path / "encoder")
    options = options.replace("/moved", "/encoder")
    model = tiny.drawn(BertModel, tiny.CONFIGS["BERT"])
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(tmp_path / "encoder")
    assert url() != before


def test_a_stage_that_does_not_tell_its_lengths_is_refused_batches_of_tokens(tmp_path):
    (tmp_path / "own.py").write_text(
        SILENT + "\nclass Long(FactQuestions):\n    def lengths(self, split):\n"
        "        return [len(text.split()) for text in (self.train_data() if split == 'train' else self.query_data()).texts]\n"
    )
    text = "batch_tokens = 64\n" + CONFIG.replace("tda.problems.facts:FactQuestions", "own.py:Long")
    with pytest.raises(
        InputError, match=r"batch_tokens = 64: problem 'tda\.problems\.facts:FactCorpus' does not say how long its examples are"
    ):
        attribute.examine(attribute.request_of(load_config(written(tmp_path, text), (), f"file:{tmp_path}/store")))


def test_an_evaluation_by_retraining_still_refuses_stages_by_name(tmp_path):
    from flows.evaluate import evaluate_run

    text = CONFIG.replace('kind = "tracing"', "")
    with pytest.raises(InputError, match='kind = "tracing"'):
        evaluate_run(load_config(written(tmp_path, text), (), f"file:{tmp_path}/store"))


def test_a_run_that_was_traced_opens_like_others(done):
    _, store, summary, data = done
    run = tda.open_run(store, summary.run_id)
    assert isinstance(run, Run)
    assert {"gold_rank", "gold_recall", "answer", "tracing"} <= set(data)
    assert data["answer"].shape == (2, data.sizes["query"])
    np.testing.assert_allclose(data["answer"][0], run.query_measurement)
