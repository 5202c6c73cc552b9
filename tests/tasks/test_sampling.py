"""Chains as an artifact: whole chunks, one piece lost to a kill, lost chains left out, scores that are the covariances."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import directions, layout, sampling, scores
from tasks import plan as plans
from tasks.tensors import write_tensors
from tda import location
from tda.errors import InputError
from tda.sampled import token_scores
from tda.sampling.covariance import covariance
from tda.sampling.stored import Trajectories
from tests.flows.runs import objects
from tests.tasks.jobs import planned

TEXT = """
problem = "tiny.py:Tiny"
shard_size = 6
query_block = 3
[[methods]]
name = "bif"
draws = 24
burn_in = 5
thinning = 2
segment = 7
together = 2
step_size = 0.01
localization = 5.0
batch_size = 8
"""
TOKENS = """
problem = "tda.problems.sentences:Sentences"
problem_options = {examples = 12, queries = 3, epochs = 1}
[[methods]]
name = "bif"
tokens = true
draws = 16
burn_in = 4
thinning = 1
step_size = 0.001
localization = 5.0
batch_size = 4
"""


class Killed(BaseException):
    """Not an Exception: nothing may swallow it."""


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    yield
    for cached in (sampling._ready, sampling.load, scores._parts):
        cached.cache_clear()


def prepared(folder: Path, *overrides: str, text: str = TEXT) -> tuple[plans.Plan, sampling.SampleJob]:
    plan = planned(folder / "config", f"{folder}/store", *overrides, text=text).placed(f"file://{folder}/run")
    (job,) = plan.first.fits.values()
    assert isinstance(job, sampling.SampleJob)
    sampling.prepare(job)
    return plan, job


def sample(job: sampling.SampleJob) -> Trajectories:
    for group in range(len(job.cut.groups)):
        sampling.sample_group((job, group))
    sampling.finish(job)
    assert layout.is_complete(job.url)
    return sampling.load(job.url)[0]


def scored(plan: plans.Plan):
    job = plan.first.scores
    for each in job.methods:
        for block in range(each.directions.blocks):
            directions.make_directions((each.directions, block))
    scores.create_results(job, {}, plans.results_attrs(plan, "RUN"))
    shards, blocks = job.shape
    for shard in range(shards):
        for block in range(blocks):
            scores.score_shard((job, shard, block))
        scores.verify_shard((job, shard))
    return location.open_group(job.results)


@pytest.mark.parametrize("calls", [1, 4, 9])
def test_a_group_that_is_killed_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    undisturbed = prepared(tmp_path / "undisturbed")[1]
    sample(undisturbed)
    job = prepared(tmp_path / "killed")[1]
    steps: list[int] = []

    def record(recorder, state, piece, real=sampling.Recorder.record):  # type: ignore[no-untyped-def]
        steps.append(piece.stop - piece.start)
        return real(recorder, state, piece)

    with monkeypatch.context() as patch:
        left = iter(range(calls))
        for name in ("write_tensors", "_write"):
            real = getattr(sampling, name)

            def until(*given, real=real):  # type: ignore[no-untyped-def]
                real(*given)
                if next(left, None) is None:
                    raise Killed

            patch.setattr(sampling, name, until)
        with pytest.raises(Killed):
            sample(job)
    monkeypatch.setattr(sampling.Recorder, "record", record)
    sample(job)
    assert objects(job.url) == objects(undisturbed.url)
    assert not [name for name in objects(job.url) if name.startswith("state")]
    whole = 2 * len(job.cut.pieces)
    # Every piece has a call that writes its draws (none while burning in) and one that writes the state.
    done = {1: 1, 4: 2, 9: 5}[calls]
    assert len(steps) == whole - done, "only the piece that was under way is sampled again"


def test_a_piece_holds_fewer_draws_where_they_are_many_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample(prepared(tmp_path / "whole")[1])
    # 2 chains of 23 losses, 5 losses and 5 measurements.
    monkeypatch.setattr("tda.sampling.stored.PIECE_BYTES", 3 * 2 * (23 + 2 * 5) * 4)
    held: list[int] = []

    def record(recorder, state, piece, real=sampling.Recorder.record):  # type: ignore[no-untyped-def]
        held.append(len(piece.draws))
        return real(recorder, state, piece)

    monkeypatch.setattr(sampling.Recorder, "record", record)
    job = prepared(tmp_path / "cut")[1]
    cut = sample(job)
    assert max(held) == 3
    assert location.open_group(job.zarr)["loss_train"].chunks[1] == 3
    torch.testing.assert_close(cut.train(range(23)), whole.train(range(23)), rtol=1e-5, atol=1e-7)


def test_no_gradients_of_queries_are_taken_for_scores_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, job = prepared(tmp_path)
    stored = sample(job)

    def refuse(*_given: object, **_named: object) -> None:
        raise AssertionError("gradients")

    monkeypatch.setattr(directions, "query_gradients", refuse)
    group = scored(plan)
    assert np.isfinite(np.asarray(group["influence"])).all()
    assert np.isfinite(np.asarray(group["query_measurement"])).all()
    assert stored.told["queries"] == 5


def test_groups_change_nothing_but_rounding(tmp_path: Path) -> None:
    found = [sample(prepared(tmp_path / str(n), f"methods.0.together={n}")[1]) for n in (1, 4)]
    torch.testing.assert_close(found[0].train(range(23)), found[1].train(range(23)), rtol=1e-5, atol=1e-6)


def test_scores_are_the_covariances_of_what_is_stored(tmp_path: Path) -> None:
    plan, job = prepared(tmp_path)
    stored = sample(job)
    assert stored.examples == 23
    group = scored(plan)
    value, stderr = covariance(stored.train(range(23)).double(), stored.measurement(range(5)).double())
    scale = stored.sampling.n_beta / 23
    np.testing.assert_allclose(group["influence"][0], -scale * value, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(group["stderr"][0], scale * stderr, rtol=2e-3, atol=1e-7)
    own = covariance(stored.train(range(23)).double(), stored.train(range(23)).double())[0].diagonal()
    np.testing.assert_allclose(group["self_influence"][0], -scale * own, rtol=2e-4)
    assert (np.asarray(group["self_influence"]) < 0).all()


def test_normalized_scores_are_correlations(tmp_path: Path) -> None:
    plan, job = prepared(tmp_path, "methods.0.normalized=true")
    stored = sample(job)
    group = scored(plan)
    x, f = (t.double() - t.double().mean(1, keepdim=True) for t in (stored.train(range(23)), stored.measurement(range(5))))
    plain = torch.einsum("cti,ctq->qi", x, f) / (f.square().sum((0, 1))[:, None] * x.square().sum((0, 1))).sqrt()
    found = torch.from_numpy(np.asarray(group["influence"][0])).double()
    assert float(torch.corrcoef(torch.stack([found.flatten(), -plain.flatten()]))[0, 1]) > 0.99
    assert float(found.abs().max()) <= 1
    assert plan.methods[0].unit == "correlation"
    assert (np.asarray(group["self_influence"]) == -1).all()


def test_a_lost_chain_is_named_and_left_out(tmp_path: Path) -> None:
    plan, job = prepared(tmp_path)
    (first, second, *_), chains = job.cut.pieces, job.cut.groups[1]
    _, shared, recorder = sampling._ready(job)
    state, losses = sampling.start(shared, list(chains)), []
    for piece in (first, second):
        state, recorded = recorder.record(state, piece)
        sampling._write(job, chains, piece, recorded)
        losses.append(recorded.batch_loss.float())
    state.weights[0, 0] = torch.nan  # what no sampler would do of itself at so small a step
    kept = {sampling._LOSSES: torch.cat(losses, 1), sampling._PIECES: torch.tensor(2)}
    write_tensors(job.state(1), sampling.state_tensors(state) | kept)
    stored = sample(job)
    assert stored.chains == [0, 1, 3]
    assert "chain 2 was stopped at step 19" in stored.told["lost"]["2"]
    values = np.asarray(location.open_group(job.zarr)["loss_train"])
    assert np.isfinite(values[2, :7]).all()
    assert np.isnan(values[2, 7:]).all()
    assert np.isfinite(np.delete(values, 2, 0)).all()
    told = sampling.diagnostics_of(job)
    assert told["chains"] == 3
    assert any("chain 2" in sentence for sentence in told["verdict"])
    assert np.isfinite(np.asarray(scored(plan)["influence"])).all()


def test_where_all_chains_are_lost_the_cause_and_a_smaller_step_are_said(tmp_path: Path) -> None:
    job = prepared(tmp_path, "methods.0.step_size=1000.0")[1]
    assert "is not below the stability bound" in sampling.warnings(job)[0]
    with pytest.raises(InputError, match=r"all 4 chains were lost: chain 0 was stopped at step \d+: .* lower step_size from 1e\+03 below"):
        sample(job)
    assert not layout.is_complete(job.url)


@pytest.mark.parametrize("array", ["loss_train", "measurement_query", "batch_loss", "mean_loss_train"])
def test_a_lost_chunk_is_found_and_sampled_again(tmp_path: Path, array: str) -> None:
    job = prepared(tmp_path)[1]
    for group in range(2):
        sampling.sample_group((job, group))
    before = objects(job.zarr)
    chunks = Path(job.zarr.removeprefix("file://"), array, "c")
    max(chunks.rglob("*"), key=lambda path: (path.is_file(), str(path))).unlink()
    with pytest.raises(ArithmeticError, match=array):
        sampling.finish(job)
    sample(job)
    assert objects(job.zarr) == before


def test_scores_of_tokens_add_up_to_those_of_their_sequence(tmp_path: Path) -> None:
    plan, job = prepared(tmp_path, text=TOKENS)
    stored = sample(job)
    influence = np.asarray(scored(plan)["influence"])[0]
    for query in range(3):
        tokens = token_scores(stored, query, range(12))
        assert tokens.shape == (12, 7)
        np.testing.assert_allclose(tokens.sum(1), influence[query], rtol=1e-4, atol=1e-6)
        both = token_scores(stored, query, [5, 0], by_query_token=True)
        np.testing.assert_allclose(both.sum((1, 2)), influence[query, [5, 0]], rtol=1e-4, atol=1e-6)
    length = int((plans.open_subject(job.subject).train[0][1] >= 0).sum())
    assert (token_scores(stored, 0, [0])[0, length:] == 0).all()


def test_normalized_scores_of_tokens_are_correlations(tmp_path: Path) -> None:
    stored = sample(prepared(tmp_path, text=TOKENS)[1])
    tokens, asked = stored.columns("token_loss_train", [5, 0]).double().numpy(), stored.measurement([1]).double().numpy()[..., 0]
    found = token_scores(stored, 1, [5, 0], normalized=True)
    x, f = (values - values.mean(1, keepdims=True) for values in (tokens, asked))
    spread = np.sqrt(np.square(f).sum() * np.square(x).sum((0, 1)))
    plain = np.einsum("ctik,ct->ik", x, f) / np.where(spread > 0, spread, 1)
    assert float(np.corrcoef(found.ravel(), -plain.ravel())[0, 1]) > 0.99
    assert np.abs(found).max() <= 1
    assert np.abs(found).max() > 3 * np.abs(token_scores(stored, 1, [5, 0])).max()
    by_token = token_scores(stored, 1, [5, 0], by_query_token=True, normalized=True)
    assert by_token.shape == (2, 7, 7)
    assert np.abs(by_token).max() <= 1


def test_products_and_the_batch_of_a_linearisation_make_no_other_chains(tmp_path: Path) -> None:
    changes = ((), ('products="bfloat16"',), ("batch_size=3",), ("seed=1",))
    urls = [prepared(tmp_path, 'dtype="float32"', *change)[1].url for change in changes]
    assert urls[0] == urls[1] == urls[2] != urls[3]


def test_columns_come_in_the_order_that_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "chunk_examples", lambda *_: 4)
    stored = sample(prepared(tmp_path)[1])
    wanted = [22, 3, 4, 3, 0, 17]
    whole = torch.from_numpy(np.asarray(location.open_group(stored.zarr)["loss_train"]))
    assert torch.equal(stored.train(wanted), whole[:, :, wanted])


def test_what_is_auto_is_settled_once_and_stored(tmp_path: Path) -> None:
    text = TEXT.replace("step_size = 0.01\nlocalization = 5.0\n", "damping = 0.5\n")
    job = prepared(tmp_path, text=text)[1]
    told = sampling.settled_of(job)
    assert told["sampling"]["localization"] == pytest.approx(0.5 * told["sampling"]["n_beta"])
    stiffest = told["sampling"]["n_beta"] * told["sigma_max"] + told["sampling"]["localization"]
    assert told["bound"] == pytest.approx(4 / stiffest)
    assert told["sampling"]["step_size"] < told["bound"] / 10
    before = objects(job.url)
    sampling.prepare(job)
    assert objects(job.url) == before
    found = sampling.tuned(job)
    assert found["sampling"] == told["sampling"]
    assert json.loads(json.dumps(found)) == found
