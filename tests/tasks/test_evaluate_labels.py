"""How well wrong labels are found is told only where self-influence says something."""

from types import SimpleNamespace

import numpy as np

from tasks import evaluate as measuring
from tasks import evaluate_results


def test_self_influence_that_is_the_same_for_all_is_not_held_against_wrong_labels() -> None:
    own, told = {"ekfac": -np.arange(1.0, 31), "gradcos": -np.ones(30)}, {"seed": 0}
    run = SimpleNamespace(self_influence=[SimpleNamespace(to_numpy=lambda each=each: each) for each in own.values()])
    known = SimpleNamespace(run=run, wrong=np.arange(30) % 5 == 0, inspected=np.array([3]))
    assert [sorted(measuring._detected(known, m, told)) for m in (0, 1)] == [["mislabelled_auc", "mislabelled_precision"], []]


def test_self_influence_that_is_not_finite_is_named(monkeypatch) -> None:
    own = np.where(np.isin(np.arange(30), [4, 9]), np.inf, -1.0)
    run = SimpleNamespace(self_influence=[SimpleNamespace(to_numpy=lambda: own)], methods=["ekfac"])
    known = SimpleNamespace(run=run, wrong=np.arange(30) % 5 == 0, inspected=np.array([3]))
    found = measuring._detected(known, 0, {"seed": 0})
    assert list(found) == ["not_finite"]
    monkeypatch.setattr(evaluate_results, "given", lambda _: known)
    (note,) = evaluate_results._not_finite(None, SimpleNamespace(numbers=[found, {}]))
    assert note.startswith("the self-influence of ekfac is not finite for 2 training examples, the first of which is 4")
