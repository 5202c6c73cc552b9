"""A configuration that names a language model: its paths, its checkpoint as a folder, and what makes a result another one."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tda
from flows.attribute import request_of
from flows.cli import status
from flows.config import load_config
from tasks.plan import plan
from tasks.prepare import examine
from tasks.report_parts import parting
from tasks.subject import forget, open_subject
from tda import InputError
from tda.data import load_batch
from tda.lowrank import ROUGH
from tda.problem import load_problem, problem_digest
from tda.results import NotStored
from tests.tda import language_models as tiny
from tests.tda.pipeline import attribute

CONFIG = """
problem = "tda.problems.language:CausalLM"
checkpoint = "weights"
dtype = "float64"
modules = ["mlp"]
[problem_options]
checkpoint = "model"
train = "train.jsonl"
query = "query.jsonl"
[[methods]]
name = "graddot"
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A configuration in a folder that is not the current one; the weights lie in shards beside it."""
    folder = tmp_path / "there"
    folder.mkdir()
    tiny.save(folder / "model", "GPT-2")
    tiny.save(folder / "weights", "GPT-2", max_shard_size="1KB", tokenizer=False)
    tiny.lines(folder / "train.jsonl", tiny.TEXTS)
    tiny.lines(folder / "query.jsonl", tiny.TEXTS[:2])
    (folder / "run.toml").write_text(CONFIG)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield folder / "run.toml"
    forget()


def test_paths_are_taken_from_the_configurations_folder_and_weights_from_a_folder_of_shards(config):
    request = request_of(load_config(config))
    inputs = examine(request)
    assert (inputs.examples, inputs.queries) == (len(tiny.TEXTS), 2)
    attributed = open_subject(request.subject).attributed
    assert {name for block in attributed.blocks for name in block.parameters} == {
        f"transformer.h.0.mlp.{layer}.{last}" for layer in ("c_fc", "c_proj") for last in ("weight", "bias")
    }
    truth = tiny.drawn(tiny.CAUSAL["GPT-2"], tiny.CONFIGS["GPT-2"]).state_dict()
    assert all(torch.equal(tensor, truth[key].double()) for key, tensor in attributed.model.state_dict().items())


def test_without_weights_and_without_epochs_there_is_nothing_to_attribute(config):
    request = request_of(load_config(config, ["checkpoint=weights"]))
    examine(request)
    config.write_text(CONFIG.replace('checkpoint = "weights"', ""))
    with pytest.raises(InputError, match="has no fit method and the config no checkpoint"):
        examine(request_of(load_config(config)))
    examine(request_of(load_config(config, ["problem_options.epochs=1"])))


def test_an_edited_config_or_tokenizer_is_another_problem_and_so_are_weights_only_where_they_are_trained_on(config):
    parsed = load_config(config)

    def digests():
        return [problem_digest(parsed.problem, parsed.problem_options | {"epochs": epochs}) for epochs in (0, 1)]

    first = digests()
    assert digests() == first
    weights = config.parent / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    second = digests()
    assert second[0] == first[0]
    assert second[1] != first[1]
    settings = config.parent / "model" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"n_head": 4}))
    third = digests()
    assert not set(third) & {*first, *second}


def test_bad_data_end_the_examination_in_one_line(config):
    tiny.lines(config.parent / "train.jsonl", [*tiny.TEXTS, {"input_ids": [3, 99]}])
    with pytest.raises(InputError, match=r"train example 5 \(train\.jsonl, line 6\) has the token 99") as error:
        examine(request_of(load_config(config)))
    assert "\n" not in str(error.value)


def test_a_run_notes_what_is_silent_and_tells_what_each_token_adds_to_a_score(config, single):
    tiny.lines(config.parent / "train.jsonl", [*tiny.TEXTS, {"prompt": "the cat", "completion": ""}])
    more = (
        '[[methods]]\nname = "ekfac"\nfisher = "empirical"\ndamping = [1e-3, 1e-2]\n',
        'modules = ["mlp", "attention", "*.ln_2"]',
    )
    config.write_text(CONFIG.replace('modules = ["mlp"]', more[1]) + more[0])
    assert status(["run", str(config), "--store", f"file:{config.parent / 'store'}", "--set", single]) == 0
    run = tda.open_run(config.parent / "store")
    assert "1 training examples have no labelled token, so their scores are 0: 5" in run.manifest["notes"]
    assert (run.influence[:, :, 5] == 0).all()
    for method in run.methods:
        found = run.token_influence(1, [0, 4, 2], method)
        assert found.dims == ("train", "train_token")
        wanted = run.influence.sel(method=method)[1, [0, 4, 2]]
        torch.testing.assert_close(torch.tensor(found.sum("train_token").values), torch.tensor(wanted.values), rtol=1e-5, atol=1e-7)
    assert (found[2, 2:] == 0).all()
    both = run.token_influence(1, [0, 4, 2], method, by_query_token=True)
    assert both.dims == ("train", "train_token", "query_token")
    torch.testing.assert_close(torch.tensor(both.sum("query_token").values), torch.tensor(found.values), rtol=1e-5, atol=1e-7)
    page = (Path(run.url.removeprefix("file://")) / "report.html").read_text()
    assert page.count('<p class="tokens">') == 2 * 4 * len(run.methods)
    assert page.count('<p class="tokens of-query">') == 2 * 4 * len(run.methods)
    with pytest.raises(InputError, match="no train example 6"):
        run.token_influence(0, [6])
    with pytest.raises(NotStored, match="no scores of single tokens under 'bif'; it has those of graddot, ekfac"):
        run.token_influence(0, [0], "bif")
    shutil.rmtree(config.parent / "weights")
    tiny.save(config.parent / "weights", "GPT-NeoX", tokenizer=False)
    with pytest.raises(InputError, match=r"the weights of run .* are gone"):
        run.token_influence(0, [0])


def test_how_gradients_are_batched_and_rounded_makes_no_other_chains_and_no_other_spectra(config):
    methods = 'name = "bif"\nstep_size = 1e-4\nlocalization = 5.0\nbatch_size = 2\n[[methods]]\nname = "ggn"\n'
    text = CONFIG.replace('dtype = "float64"\n', "") + f'[[methods]]\n{methods}[[methods]]\nname = "ekfac"\n'
    found = {}
    for option in ("", "batch_tokens = 9\n", 'autocast = "bfloat16"\n'):
        config.write_text(option + text)
        request = request_of(load_config(config))
        found[option] = list(plan(request, examine(request)).first.fits.values())
    plain, *others = found.values()
    assert [type(job).__name__ for job in plain] == ["SampleJob", "DenseJob", "FactorJob"]
    for other in others:
        assert [job.url for job in other[:2]] == [job.url for job in plain[:2]]
        assert other[2].url != plain[2].url


SHORTER = [
    ('products = "bfloat16"\n', 'name = "datainf"\ndamping = 1e-2\n[[methods]]\nname = "representation"'),
    ('autocast = "bfloat16"\n', 'name = "ekfac"\nfisher = "empirical"\ndamping = 1e-2'),
]


@pytest.mark.parametrize(("option", "method"), SHORTER)
def test_parts_of_tokens_sum_to_scores_that_were_computed_in_bfloat16(config, single, option, method):
    text = option + CONFIG.replace('dtype = "float64"\n', "") + f"[[methods]]\n{method}\n"
    config.write_text(text)
    assert status(["run", str(config), "--store", f"file:{config.parent / 'store'}", "--set", single]) == 0
    run = tda.open_run(config.parent / "store")
    title = run.methods[1]
    found, wanted = run.token_influence(1, [0, 4, 2], title).sum("train_token").values, run.influence.sel(method=title)[1, [0, 4, 2]].values
    np.testing.assert_allclose(found, wanted, atol=(5e-3 if "products" in option else 1e-5) * np.abs(wanted).max())
    for other in run.methods[2:]:
        with pytest.raises(NotStored, match=f"no scores of single tokens under '{other}'; it has those of graddot, datainf"):
            run.token_influence(1, [0], other)


def test_the_examples_data_are_what_its_generator_writes_and_its_model_learns_them(tmp_path):
    examples = Path(__file__).parents[2] / "docs" / "examples"
    runpy.run_path(str(examples / "language" / "make.py"))["main"](tmp_path)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) == 11
    assert all(file.read_bytes() == (examples / "language" / file.relative_to(tmp_path)).read_bytes() for file in written)
    parsed = load_config(examples / "language.toml")
    problem = load_problem(parsed.problem, parsed.problem_options)
    torch.manual_seed(0)
    model = problem.model()
    problem.fit(model, problem.train_data(), seed=0, on_checkpoint=lambda **_: None)
    batch = load_batch(problem, problem.query_data(), range(len(problem.query_data())), dtype=torch.float32)
    asked = batch.targets != -100
    assert (problem.predict(model.eval(), batch).argmax(-1) == batch.targets)[asked].float().mean() > 0.9


SHORT = """
[[methods]]
name = "ekfac"
fisher = "empirical"
damping = 0.1
[[methods]]
name = "ekfac"
label = "short"
query_rank = 2
fisher = "empirical"
damping = 0.1
"""


def test_a_run_in_batches_of_tokens_and_a_low_rank_gives_the_full_scores_and_states_what_the_rank_loses(config, single):
    text = CONFIG.partition("[[methods]]")[0]
    config.write_text(text.replace("[problem_options]", "batch_tokens = 15\n[problem_options]") + SHORT)
    assert status(["run", str(config), "--set", single]) == 0
    run, problem = tda.open_run("file:./store"), open_subject(request_of(load_config(config)).subject).attributed.problem
    attributed = open_subject(request_of(load_config(config)).subject).attributed
    wanted = attribute(problem, [{"name": "ekfac", "fisher": "empirical", "damping": 0.1}], attributed=attributed, batch_size=1)
    full, short = run.influence.values
    np.testing.assert_allclose(full, wanted.influence[0], rtol=1e-4, atol=1e-6 * np.abs(full).max())
    found = run.manifest["low_rank"]
    assert list(found) == ["short"]
    assert set(found["short"]["mean"]) == {f"transformer.h.0.mlp.{layer}" for layer in ("c_fc", "c_proj")}
    errors = [*found["short"]["mean"].values(), *found["short"]["largest"].values()]
    assert 0 < min(errors) <= max(errors) < 1
    assert 0 < np.linalg.norm(short - full) < 2 * max(errors) * np.linalg.norm(full)
    request = request_of(load_config(config))
    parts = [parting(plan(request, examine(request)))(place, 1, [0, 4, 2]) for place in (0, 1)]
    for each, stored in zip(parts, run.influence.values, strict=True):
        np.testing.assert_allclose(each.train.sum(1), stored[1, [0, 4, 2]], rtol=1e-4, atol=1e-6 * np.abs(stored).max())
    assert [each.in_full for each in parts] == [False, True]
    np.testing.assert_allclose(parts[1].query, parts[0].query, rtol=1e-4, atol=1e-6 * np.abs(parts[0].query).max())
    page = (Path(run.url.removeprefix("file://")) / "report.html").read_text()
    assert page.count("with directions in full: they add up") == page.count('<p class="tokens of-query">') / 2 > 0
    warned = any("query_rank = 2 keeps the directions of" in note for note in run.manifest["notes"])
    assert warned == (max(found["short"]["mean"].values()) > ROUGH)


def test_ranks_budgets_and_autocast_are_checked_before_anything_is_done(config):
    with pytest.raises(InputError, match="query_rank must be at least 1, got 0"):
        load_config(config, ["query_rank=0"])
    assert json.loads(request_of(load_config(config, ["query_rank=3"])).methods[0])["query_rank"] == 3
    with pytest.raises(InputError, match="batch_size = 2 counts examples and batch_tokens = 9 tokens; leave one of them out"):
        examine(request_of(load_config(config, ["batch_size=2", "batch_tokens=9"])))
    with pytest.raises(InputError, match='autocast = "bfloat16" makes no sense with the float64 model'):
        examine(request_of(load_config(config, ["autocast=bfloat16"])))


def test_tokens_and_checkpointing_of_a_model_without_sequences_or_layers_are_refused(tmp_path):
    file = tmp_path / "digits.toml"
    file.write_text('problem = "tda.problems.digits:Digits"\nbatch_tokens = 64\n[[methods]]\nname = "graddot"\n')
    with pytest.raises(InputError, match=r"does not say how long its examples are; define Problem\.lengths"):
        examine(request_of(load_config(file)))
    with pytest.raises(InputError, match=r"checkpoint_activations = true is about layers in an nn\.ModuleList of several"):
        examine(request_of(load_config(file, ["checkpoint_activations=true"])))
