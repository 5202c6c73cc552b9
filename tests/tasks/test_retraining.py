"""The ground truth is the same in any order and after any kill, and each of its models is the one that training alone gives."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infra import storage
from tasks import retraining
from tasks.retrained import Block, missing, shared, stored
from tasks.retraining import Piece, RetrainJob, load_truth, pieces, plan, retrain_piece
from tda import InputError, location
from tda.evaluation.retraining import measure, retrain
from tda.evaluation.subsets import masks
from tda.problem import load_problem
from tests.flows.runs import objects

# 40 examples, 5 queries, and a training of a few milliseconds.
PROBLEM = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
import tda

class Small(tda.Problem):
    likelihood = tda.Categorical()
    def __init__(self, queries=5, recipe=True, rate=0.1, poison=-1):
        self.queries, self.with_recipe, self.rate, self.poison = queries, recipe, rate, poison
    def model(self):
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    def _data(self, count, seed):
        g = torch.Generator().manual_seed(seed)
        return TensorDataset(torch.randn(count, 4, generator=g), torch.randint(3, (count,), generator=g))
    def train_data(self):
        return self._data(40, 0)
    def query_data(self):
        return self._data(self.queries, 1)
    def recipe(self):
        return tda.Recipe(2, 8, self.rate, 0.9) if self.with_recipe else None
    def measurement(self, outputs, targets):
        found = self.likelihood.loss(outputs, targets)
        if 0 <= self.poison < len(found):
            found[self.poison] = torch.nan
        return found

class Alone(Small):
    def fit(self, model, dataset, *, seed, on_checkpoint):
        optimizer = torch.optim.SGD(model.parameters(), self.rate)
        for i in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist():
            x, y = dataset[i][0].to(model[0].weight.dtype), dataset[i][1]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[None]), y[None]).backward()
            optimizer.step()
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "small.py").write_text(PROBLEM)
    return f"{tmp_path}/small.py:"


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


def job(spec: str, name: str = "Small", **changes) -> RetrainJob:
    options = json.dumps(changes.pop("options", {}))
    return replace(RetrainJob("", spec + name, options, (0.3, 0.5), 7, 3, seed=11, dtype="float64"), **changes)


def run(planned: RetrainJob, order: int = 1) -> None:
    retraining.create(planned)
    for piece in pieces(planned)[::order]:
        retrain_piece(piece)
    retraining.finish(planned)


@pytest.mark.parametrize("name", ["Small", "Alone"])
def test_every_measurement_is_that_of_its_subset_and_seed_trained_alone(spec, store, name):
    planned = plan(store, job(spec, name))
    assert bool(planned.alone) == (name == "Alone")
    assert len(pieces(planned)) == (2 * 7 * 3 if planned.alone else 2)
    run(planned)
    truth = load_truth(planned.url)
    problem = load_problem(spec + name)
    train, queries = problem.train_data(), problem.query_data()
    assert truth.measurement.shape == (2, 7, 3, 5)
    assert len(np.unique(truth.training_seed)) == 2 * 7 * 3
    for a, alpha in enumerate((0.3, 0.5)):
        np.testing.assert_array_equal(truth.masks[a], masks(40, alpha, 7, 11))
    for a, s, r in [(0, 0, 0), (1, 6, 2), (0, 3, 1)]:
        model = retrain(problem, train, np.flatnonzero(truth.masks[a, s]).tolist(), int(truth.training_seed[a, s, r]), dtype=torch.float64)
        np.testing.assert_allclose(truth.measurement[a, s, r], measure(problem, model, queries), atol=1e-12)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(retraining, "STACK", 6)


def test_tasks_in_another_order_give_the_same_bytes(spec, store, small_pieces):
    first, second = plan(store, job(spec)), plan(store + "-backwards", job(spec))
    assert len(pieces(first)) == 8
    run(first)
    run(second, order=-1)
    assert objects(first.url) == objects(second.url)
    assert first.url.rpartition("/")[2] == second.url.rpartition("/")[2]


@pytest.mark.parametrize("place", ["before a chunk", "before its receipt", "while it was created"])
def test_a_killed_retraining_goes_on_and_gives_the_same_bytes(spec, store, small_pieces, monkeypatch, place):
    undisturbed, planned = plan(store + "-undisturbed", job(spec)), plan(store, job(spec))
    run(undisturbed)

    def killed(*_, **__):
        raise KeyboardInterrupt

    if place == "while it was created":
        monkeypatch.setattr(retraining, "_seeds", killed)
    else:
        retraining.create(planned)
        retrain_piece(pieces(planned)[2])
        monkeypatch.setattr(*((retraining.storage, "write_json") if place == "before its receipt" else (retraining, "retrained")), killed)
    with pytest.raises(KeyboardInterrupt):
        run(planned)
    monkeypatch.undo()
    monkeypatch.setattr(retraining, "STACK", 6)
    again = plan(store, job(spec))
    every = [(piece.alpha, piece.block) for piece in pieces(plan(store + "-fresh", job(spec)))]
    left = {"before a chunk": [*every[:2], *every[3:]], "before its receipt": [every[1], *every[3:]], "while it was created": every}[place]
    assert [(piece.alpha, piece.block) for piece in pieces(again)] == left
    run(again)
    assert objects(planned.url) == objects(undisturbed.url)


def test_what_is_complete_is_not_trained_again(spec, store, monkeypatch):
    planned = plan(store, job(spec))
    run(planned)
    before = objects(planned.url)
    monkeypatch.setattr(retraining, "retrained", None)
    run(plan(store, job(spec)))
    assert objects(planned.url) == before


def test_an_object_lost_or_damaged_is_told_and_trained_again(spec, store, small_pieces):
    planned, whole = plan(store, job(spec)), plan(store + "-whole", job(spec))
    run(whole)
    retraining.create(planned)
    for piece in pieces(planned):
        retrain_piece(piece)
    kept = sorted(Path(planned.folders[0].removeprefix("file://")).glob("*.safetensors"))
    kept[0].unlink()
    kept[3].write_bytes(b"damage")
    with pytest.raises(
        ArithmeticError, match=r"alpha 0\.3, subsets 6\.\.6: cannot be read .*1 such objects\); the next try trains them again"
    ):
        retraining.finish(planned)
    with pytest.raises(ArithmeticError, match=r"alpha 0\.3, subsets 0\.\.0: values are missing; the next try trains them"):
        retraining.finish(planned)
    run(planned)
    assert objects(planned.url) == objects(whole.url)


def test_other_numbers_data_or_code_are_another_truth(spec, store, tmp_path):
    urls = {plan(store, job(spec, **changes)).url for changes in ({}, {"seed": 12}, {"seeds": 4}, {"alphas": (0.5,)}, {"dtype": "float32"})}
    urls |= {plan(store, job(spec, options={"queries": 4})).url}
    (tmp_path / "small.py").write_text(PROBLEM.replace("nn.Linear(4, 6)", "nn.Linear(4, 6, bias=True)"))
    urls |= {plan(store, job(spec)).url}
    assert len(urls) == 7


def test_more_subsets_seeds_or_alphas_train_only_what_is_missing_and_fewer_nothing(spec, store, small_pieces, monkeypatch):
    first = plan(store, job(spec))
    run(first)
    known = load_truth(first.url)
    more = plan(store, job(spec, alphas=(0.5, 0.7), subsets=9, seeds=5))
    assert sum(piece.block.models for piece in pieces(more)) == (9 * 5 - 7 * 3) + 9 * 5
    assert max(piece.block.models for piece in pieces(more)) <= 6
    run(more)
    fresh = plan(store + "-fresh", job(spec, alphas=(0.5, 0.7), subsets=9, seeds=5))
    run(fresh)
    found, wanted = load_truth(more.url), load_truth(fresh.url)
    for name in ("masks", "training_seed"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    np.testing.assert_allclose(found.measurement, wanted.measurement, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.measurement[0, :7, :3], known.measurement[1])
    before = objects(first.url)
    monkeypatch.setattr(retraining, "retrained", None)
    for fewer in ({"alphas": (0.7,), "subsets": 3, "seeds": 5}, {"subsets": 5, "seeds": 1}):
        asked = plan(store, job(spec, **fewer))
        assert pieces(asked) == []
        run(asked)
        again = load_truth(asked.url)
    np.testing.assert_array_equal(again.measurement, known.measurement[:, :5, :1])
    assert objects(first.url) == before


def test_a_retraining_is_priced_by_the_work_of_all_tries_and_not_at_all_where_one_could_not_say(spec, store, small_pieces):
    planned = plan(store, job(spec))
    retraining.create(planned)
    spent = [retrain_piece(piece)["seconds"] for piece in pieces(planned)[:3]]
    spent += [retrain_piece(piece)["seconds"] for piece in pieces(planned)]  # as after a kill
    assert retraining.spent(planned) == pytest.approx(sum(spent))
    half = plan(store, job(spec, alphas=(0.3,), seeds=1))
    assert 0 < retraining.spent(half) < sum(spent)
    storage.delete(Piece(planned, 0, stored(planned.folders[0])[0]).receipt)
    assert retraining.spent(planned) is None


def test_blocks_that_are_missing_cover_what_is_missing_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        subsets, repeats, most = (int(n) for n in rng.integers(1, 12, 3))
        held = [Block(range(a, a + n), range(b, b + m)) for a, n, b, m in rng.integers(1, 6, (int(rng.integers(4)), 4)).tolist()]
        found, count = missing(held, subsets, repeats, most), np.zeros((subsets, repeats), int)
        for block in held:
            count[block.where] = 1
        for block in found:
            assert block.models <= most
            count[block.where] += 1
        assert (count == 1).all()
        assert sum(mine.sum() for _, mine in shared([*held, *found], subsets, repeats)) == subsets * repeats
        # Whatever was done of them before a kill, the others are asked for again.
        done = [block for block in found if rng.random() < 0.5]
        assert missing([*held, *done], subsets, repeats, most) == [block for block in found if block not in done]


def test_who_goes_on_keeps_to_the_choice_of_who_began(spec, store, monkeypatch):
    planned = plan(store, job(spec))
    retraining.create(planned)
    monkeypatch.setattr(retraining, "unstackable", lambda *_, **__: "another machine says no")
    assert plan(store, job(spec)) == planned


def test_an_edited_problem_is_not_trained_under_the_old_name(spec, store, tmp_path):
    planned = plan(store, job(spec))
    with pytest.raises(InputError, match="is not the one that the retraining was planned with"):
        retraining.create(replace(planned, source="another"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphas": (0.5, 1.0)}, r"alpha must be in \(0, 1\)"),
        ({"alphas": (0.5, 0.5)}, "alphas must be different numbers"),
        ({"alphas": ()}, "at least one"),
        ({"subsets": 2}, "subsets must be at least 3"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"options": {"recipe": False}}, "has neither fit nor recipe: it cannot be retrained"),
    ],
)
def test_what_cannot_be_retrained_is_refused_before_anything_is_written(spec, store, changes, message):
    with pytest.raises(InputError, match=message) as error:
        plan(store, job(spec, **changes))
    assert "\n" not in str(error.value)
    assert not location.exists(store)


def test_a_measurement_that_is_not_finite_is_named_and_nothing_of_it_stored(spec, store):
    planned = plan(store, job(spec, options={"poison": 2}))
    retraining.create(planned)
    with pytest.raises(InputError, match=r"the measurement of query 2 is nan after retraining on subset 0 of alpha = 0\.3 with repeat 0"):
        retrain_piece(pieces(planned)[0])
    assert not location.exists(pieces(planned)[0].receipt)
    assert not location.exists(pieces(planned)[0].url)


def test_a_truth_under_way_is_not_read(spec, store):
    planned = plan(store, job(spec))
    retraining.create(planned)
    with pytest.raises(InputError, match="is not complete; run the command that began it again"):
        load_truth(planned.url)
