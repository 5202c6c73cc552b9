"""What a method cost is what its own artifacts cost, shared or not."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from infra import storage
from tasks import plan as plans
from tasks.evaluate_cost import compute_seconds
from tests.tasks.jobs import options, planned

CONFIG = """
problem = "tiny.py:Tiny"
problem_options = {examples = 60}
[[methods]]
name = "source"
fisher = "exact"
[[methods]]
name = "fast_source"
fisher = "exact"
label = "one"
[[methods]]
name = "fast_source"
fisher = "exact"
label = "other"
damping = 0.5
[[methods]]
name = "ekfac"
fisher = "exact"
[[methods]]
name = "graddot"
"""


def test_a_fit_that_methods_share_is_priced_for_each_and_never_as_another_methods(tmp_path: Path) -> None:
    plan = planned(tmp_path / "config", f"file://{tmp_path}/store", text=CONFIG)
    price = {job.url: 2.0**k for k, job in enumerate(plan.first.fits.values())}
    assert len(price) == 3 + 3 + 1
    for url, seconds in price.items():
        storage.write_json(f"{url}/seconds.json", {"compute": seconds})
    for scored in plan.first.scores.methods:
        storage.write_json(f"{scored.directions.url}/seconds.json", {"compute": 0.0})
    told = {"config": {"methods": options(plan)}, "fingerprints": plans.described(plan)}
    run = SimpleNamespace(store=f"file://{tmp_path}/store", url=f"file://{tmp_path}/store/runs/none", manifest=told)
    wanted = [sum(price[url] for url in scored.directions.fits) for scored in plan.first.scores.methods]
    assert compute_seconds(run).tolist() == wanted == [1 + 2 + 4, 8 + 16 + 32, 8 + 16 + 32, 64, 0]
    interrupted = plan.first.scores.methods[3].directions.fits[0]
    storage.write_json(f"{interrupted}/seconds.json", {"compute": None})
    np.testing.assert_array_equal(compute_seconds(run), [*wanted[:3], np.nan, 0])
