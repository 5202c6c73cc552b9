"""Retention on real runs: what stays can be opened in full, and its configuration reuses everything."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import tda
from tasks.prune import Rules, delete, plan
from tests.flows.runs import attribute, digests, write_config

CONFIG = """
problem = "tiny.py:Tiny"
shard_size = 12
[[methods]]
name = "trak"
projection_dim = 8
models = 2
[[methods]]
name = "ekfac"
damping = 0.01
"""


def test_a_run_that_stays_keeps_all_it_needs_and_what_only_the_dropped_one_had_is_gone(cluster: str, tmp_path: Path) -> None:
    config, store = write_config(tmp_path / "config", CONFIG), tmp_path / "store"
    attribute(config, str(store), cluster, "seed=1")
    _, kept = attribute(config, str(store), cluster, "seed=2")
    before, folders = digests(kept), artifacts(store)
    later = datetime.now(UTC) + timedelta(days=2)
    gone = list(delete(plan(f"file://{store}", Rules(1, None, timedelta(hours=24), later))))
    assert len([each for each in gone if each.kind == "run"]) == 1
    assert list(tda.list_runs(store)["run"]) == [kept.id]
    left = artifacts(store)
    assert 2 * len(left) == len(folders), "as much as the dropped one had"
    assert digests(tda.open_run(store)) == before
    assert tda.open_run(store).factors.sizes
    summary, _ = attribute(config, str(store), cluster, "seed=2")
    assert {name.partition(" (")[0] for name in summary.reused} == {"checkpoint", "factors", "projections", "directions"}
    assert artifacts(store) == left, "nothing had to be made again"


def artifacts(store: Path) -> set[str]:
    return {f"{kind.name}/{each.name}" for kind in (store / "artifacts").iterdir() for each in kind.iterdir()}
