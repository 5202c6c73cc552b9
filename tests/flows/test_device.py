"""A whole run on a device: every stage brings there what it reads, and stores the numbers that the processor would have."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flows import attribute as flow
from flows import stages
from flows.config import load_config
from tasks import plan, training
from tasks.standing import place, standing
from tasks.subject import forget
from tda.errors import InputError
from tda.results import Run, open_run
from tests.devices import DEVICES, working_on
from tests.flows.runs import PROBLEM, write_config

#: Trained by a recipe, and so on the device; float64.
TINY = PROBLEM.partition("    def fit(")[0] + "    def recipe(self):\n        return tda.Recipe(3, 5, 0.1, momentum=0.5)\n"
METHODS = """
problem = "tiny.py:Tiny"
shard_size = 9
query_block = 3
dtype = "float64"
""" + "".join(
    f"[[methods]]\n{text}\n"
    for text in (
        'name = "gradcos"',
        'name = "kfac"\ndamping = 0.01',
        'name = "ekfac"\nfisher = "exact"\ndamping = 0.01\nquery_rank = 2',
        'name = "hessian"\ndamping = 0.1',
        'name = "block_ggn"\ndamping = 0.1',
        'name = "cg"\ndamping = 0.1',
        'name = "sni"\ndamping = 0.1\nmax_steps = 20\nbatch_size = 8',
        'name = "astra"\ndamping = 0.1\nmax_steps = 20',
        'name = "source"\nsegments = 2\nper_segment = 1',
        'name = "astra_source"\nsegments = 2\nper_segment = 1\ntolerance = 0.01',
        'name = "tracin"\ncheckpoints = 2',
        'name = "trak"\nprojection_dim = 8',
        'name = "datainf"\ndamping = 0.1',
        'name = "representation"',
        'name = "dtda"\nsubsets = 12',
        'name = "random"',
        'name = "bif"\nchains = 2\ndraws = 16\nburn_in = 2\nthinning = 1\nbatch_size = 8\nn_beta = 20\nlocalization = 30\nstep_size = 1e-4',
    )
)


class Here(stages.Session):
    """Shards computed in this process, one after another."""

    def shards(self, function, jobs, stage):
        return [function(job) for job in jobs]


class Client:
    """The only worker is this process."""

    def run(self, function, *arguments):
        return {"here": function(*arguments)}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No cluster and no Prefect."""
    monkeypatch.setattr(stages, "Session", Here)
    for name, value in list(vars(stages).items()):
        if hasattr(value, "fn"):
            monkeypatch.setattr(stages, name, value.fn)


def run_on(device: str, config: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The run of a configuration with everything on a device."""
    parsed, request_of = load_config(config, [], f"file://{store}"), flow.request_of

    def placed(config):
        request = request_of(config)
        return replace(request, subject=replace(request.subject, device=device))

    monkeypatch.setattr(flow, "request_of", placed)
    forget()
    inputs = flow.examine(placed(parsed))
    with flow.given(flow.Prepared(0.0, inputs, Client())):
        summary = flow.attribute.fn(parsed.model_dump(mode="json"))
    return open_run(f"file://{store}", summary.run_id)


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_on_a_device_stores_what_the_processor_would(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path / "config", METHODS, TINY)
    with monkeypatch.context() as patch:
        wanted = run_on("cpu", config, tmp_path / "processor", patch)
    with working_on(device) as there, monkeypatch.context() as patch:
        found = run_on(str(there), config, tmp_path / "device", patch)
    assert found.methods == wanted.methods
    assert found.manifest["devices"] == {there.type if device == "paper" else torch.cuda.get_device_name(): 1}
    assert wanted.manifest["devices"] == {"cpu": 1}
    for name in ("influence", "self_influence"):
        for method in wanted.methods:
            a, b = (getattr(run, name).sel(method=method).to_numpy() for run in (found, wanted))
            assert np.array_equal(np.isnan(a), np.isnan(b))
            assert np.nanmax(np.abs(a - b), initial=0) <= 1e-6 * np.nanmax(np.abs(b), initial=0), (name, method)


def test_keys_about_devices_are_checked_at_once(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for override, said in (
        ('device="gpu"', 'device must be "auto", "cpu" or "cuda", got "gpu"'),
        ("autocast_scale=1000", "autocast_scale must be a power of two such as 1024, so that it rounds nothing, got 1000"),
        ('autocast="float8"', 'autocast must be "bfloat16" or "float16", got "float8"; did you mean "float16"?'),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            load_config(config, [override])
    with pytest.raises(InputError, match=r'cluster\.kind = "cuda" starts a worker for each GPU, and device = "cpu" would use none of them'):
        load_config(config, ["device=cpu", 'cluster={kind="cuda"}'])
    assert flow.request_of(load_config(config, ["autocast=float16", "autocast_scale=64"])).subject.layers == "float16, scale 64"


def test_a_gpu_that_is_not_there_is_refused_before_work_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(write_config(tmp_path), ["device=cuda"])
    with pytest.raises(InputError, match=r'device = "cuda", and torch can use no GPU on this machine: `tda doctor` says why'):
        flow.cluster_for(flow.request_of(config).subject, config.cluster.spec(), "cuda")


def test_a_worker_without_the_gpu_that_a_run_asks_for_says_so_and_the_planning_process_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    problem = f"{write_config(tmp_path).parent}/tiny.py:Tiny"
    assert standing(problem, "{}", "cuda", place()) == standing(problem, "{}", "auto", ("elsewhere", 1))
    with pytest.raises(InputError, match='device = "cuda", and torch can use no GPU there'):
        standing(problem, "{}", "cuda", ("elsewhere", 1))


def test_the_device_is_no_part_of_a_fingerprint_and_the_scale_of_losses_is(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config", "problem = 'tiny.py:Tiny'\ndtype = 'float32'\n[[methods]]\nname = 'graddot'\n", TINY)

    def fingerprint(*overrides: str) -> str:
        request = flow.request_of(load_config(config, overrides, f"file://{tmp_path}/store"))
        inputs = flow.examine(request)
        training.train((request.subject, 0, plan.training_artifact(request, inputs, 0)))
        return plan.plan(request, inputs).fingerprint

    assert fingerprint("device=auto") == fingerprint("device=cpu") == fingerprint("device=cuda")
    several = [(), ("autocast=float16",), ("autocast=float16", "autocast_scale=64"), ("autocast=bfloat16",)]
    assert len({fingerprint(*each) for each in several}) == 4
    assert fingerprint("autocast_scale=64") == fingerprint()
