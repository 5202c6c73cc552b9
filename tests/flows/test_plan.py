"""The plan of a run is what the run then does: its shards and bytes exactly, its memory and operations within stated factors."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flows import stages
from flows.attribute import request_of
from flows.cli import BAD_INPUT, status
from flows.command_plan import duration
from flows.config import load_config
from tasks.planned import check_memory, on_paper, readable
from tasks.projected import PROCESS_BYTES, project
from tda import location
from tda.errors import InputError
from tda.shapes import on_paper as shapes_on_paper
from tests.flows.runs import CONFIG, attribute, objects, write_config

ROOT = Path(__file__).parents[2]
DIGITS = """
problem = "tda.problems.digits:Digits"
[problem_options]
width = 256
epochs = 1
queries = 24
[[methods]]
name = "graddot"
[[methods]]
name = "ekfac"
fisher = "exact"
damping = 1e-3
[cluster]
"""


def planned(config: Path, *overrides: str, workers: int = 2):
    return project(on_paper(request_of(load_config(config, overrides))).work(workers))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Shards by stage of the runs of a test."""
    found: dict[str, int] = {}
    original = stages.Session.shards

    def shards(self: stages.Session, function: Any, jobs: Any, stage: str) -> Any:
        found[stage] = found.get(stage, 0) + len(jobs)
        return original(self, function, jobs, stage)

    monkeypatch.setattr(stages.Session, "shards", shards)
    return found


@pytest.mark.parametrize("more", ["", "layer_block = 1", 'ensemble = 2\n[[methods]]\nname = "ggn"'])
def test_a_run_has_the_shards_and_writes_the_bytes_that_were_planned(
    tmp_path: Path, cluster: str, counted: dict[str, int], more: str
) -> None:
    top, _, methods = more.partition("\n")
    config = write_config(tmp_path, f"{top}\n{CONFIG}{methods}")
    plan = {stage.name: stage for stage in planned(config, cluster)}
    _, run = attribute(config, str(tmp_path / "store"), cluster)
    assert {name: counted[name] for name in plan} == {name: stage.shards for name, stage in plan.items()}
    assert counted.keys() - plan.keys() <= {"average", "verify the average"}
    if methods:  # the arrays of several models and of matrices are not looked at one by one
        return
    kept = {name: stage.kept for name, stage in plan.items()}
    arrays = {name: array.nbytes for name, array in location.open_group(f"{run.url}/results.zarr", "r").arrays()}
    assert kept["scores"] == sum(arrays[name] for name in ("influence", "train_loss", "query_measurement")) + arrays["self_influence"]
    for key in ("exact", "sampled"):
        url = location.join(run.store, "artifacts", "factors", run.manifest["fingerprints"]["factors"][key], "factors.zarr")
        group = location.open_group(url, "r")
        stored = sum(item.nbytes for _, item in group.members(max_depth=None) if hasattr(item, "nbytes"))
        assert stored == sum(kept[f"{stage} ({key})"] for stage in ("eigendecompositions", "finish factors"))
    for method, fingerprint in run.manifest["fingerprints"]["directions"].items():
        files = objects(location.join(run.store, "artifacts", "directions", fingerprint))
        tensors = sum(len(data) - 8 - int.from_bytes(data[:8], "little") for name, data in files.items() if name.endswith(".safetensors"))
        assert tensors == kept[f"directions ({method})"]


@pytest.mark.soak
def test_a_worker_holds_no_more_than_was_planned_and_not_much_less(tmp_path: Path) -> None:
    """Within a factor 1.5 of what it holds beyond an idle process; on the machine that measures, whatever else runs there."""
    config = write_config(tmp_path, DIGITS)
    peak = max(stage.peak for stage in planned(config, "problem_options.width=1024", "problem_options.queries=48", workers=1))
    seen = []
    original = stages.Session.shards

    def shards(self: stages.Session, function: Any, jobs: Any, stage: str) -> Any:
        receipts = original(self, function, jobs, stage)
        seen.append(max(self.client.run(highest).values()))
        return receipts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Session, "shards", shards)
        attribute(config, str(tmp_path / "store"), "problem_options.width=1024", "problem_options.queries=48", "cluster.workers=1")
    assert peak - PROCESS_BYTES > 1 << 28, "it measures something"
    assert max(seen) <= 1.5 * peak
    assert max(seen) >= peak / 1.5


def highest() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    from tasks.projected import forward
    from tda.curvature.covariances import covariance_sums
    from tda.directions import Dense, dense, query_gradients
    from tda.scoring import Scorer, score

    paper = on_paper(request_of(load_config(write_config(tmp_path, DIGITS))))
    assert paper.opened is not None
    attributed, train, work = paper.opened.attributed, paper.opened.train, paper.work(1)
    plan = {stage.name: stage for stage in project(work)}
    ids = range(work.examples)
    # torch does not count products that are added in place.
    in_place = {torch.ops.aten.addmm_: lambda _total, a, b, *_, **__: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        covariance_sums(attributed, train, ids, fisher="exact", seed=0, batch_size=work.batch)
    assert plan["covariances (exact)"].flops == pytest.approx(counter.get_total_flops(), rel=0.3)
    directions, _ = query_gradients(attributed, paper.opened.query, range(work.queries), batch_size=work.batch)
    with FlopCounterMode(display=False) as counter:
        scorer = Scorer("dense", [Dense(dense(each)) for each in directions], torch.ones(work.queries))
        score(attributed, [scorer], train, ids, examples=work.examples, batch_size=work.scoring, self_influence=False)
    counted = counter.get_total_flops()
    expected = work.examples * (2 * forward(work.shapes.blocks) + (2 + 2 * work.queries) * work.shapes.parameters)
    assert expected == pytest.approx(counted, rel=0.3)


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.9, r"set query_block = \d+$"),
        (0.5, r'even with query_block = 1, .* set cluster.memory_limit = "1GiB" where workers have as much'),
    ],
)
def test_what_a_worker_cannot_hold_is_refused_with_what_would_make_it_fit(tmp_path: Path, share: float, said: str) -> None:
    config = write_config(tmp_path, DIGITS)
    paper = on_paper(request_of(load_config(config, ["problem_options.width=1024"])))
    peak = max(stage.peak for stage in project(paper.work(2)))
    check_memory(paper, 2, peak)
    with pytest.raises(InputError, match=said) as caught:
        check_memory(paper, 2, int(share * peak))
    assert readable(peak) in str(caught.value)
    assert "\n" not in str(caught.value)
    if "query_block" in said and "even" not in said:
        option = re.findall(r"query_block = \d+", str(caught.value))
        again = on_paper(request_of(load_config(config, ["problem_options.width=1024", *option])))
        check_memory(again, 2, int(share * peak))


@pytest.mark.parametrize(
    ("set_", "gib", "said"),
    [
        ([], 150, r"set layer_block = \d+$"),
        (["query_block=8"], 150, r"set query_block = \d and layer_block = \d+$"),
        (["query_block=8", "batch_size=32"], 112, r"set query_block = \d, layer_block = \d+ and batch_size = 1$"),
        ([], 100, r"even with query_block = 1, batch_size = 1 and layer_block = 1 .* cluster.memory_limit = \"111GiB\""),
    ],
)
def test_sums_of_all_layers_that_a_worker_cannot_hold_are_offered_a_few_layers_at_a_time(set_: list[str], gib: int, said: str) -> None:
    config = ROOT / "docs" / "examples" / "plan-pythia.toml"
    with pytest.raises(InputError, match=said) as caught:
        check_memory(on_paper(request_of(load_config(config, set_))), 64, gib << 30)
    if "even" in said:
        return
    offered = [each.replace(" ", "") for each in re.findall(r"\w+ = \d+", str(caught.value))]
    check_memory(on_paper(request_of(load_config(config, [*set_, *offered]))), 64, gib << 30)
    more = [f"{name}={2 * int(value)}" for name, value in (each.split("=") for each in offered) if name == "layer_block"]
    with pytest.raises(InputError):  # twice as many layers do not fit
        check_memory(on_paper(request_of(load_config(config, [*set_, *offered, *more]))), 64, gib << 30)


def test_the_command_prints_a_plan_writes_nothing_and_refuses_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, DIGITS)
    store = tmp_path / "store"
    arguments = ["plan", str(config), "--store", str(store)]
    assert status([*arguments, "--workers", "4", "--flops", "1e9"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"covariances \(exact\) +6 ", out)
    assert "with 4 workers of 1e+09 operations a second (given)" in out
    assert not store.exists()
    assert status(arguments) == 0
    assert "(timed on one shard)" in capsys.readouterr().out
    assert status([*arguments, "--untimed", "--set", 'cluster.memory_limit="100MiB"']) == BAD_INPUT
    assert "a worker has 100 MiB; even with query_block = 1" in capsys.readouterr().err
    for flops in ("0", "inf", "nan"):
        assert status([*arguments, "--flops", flops]) == BAD_INPUT
    assert status([*arguments, "--untimed", "--set", "candidates.random=4"]) == 0
    assert "but      all training examples are planned" in capsys.readouterr().out
    assert not store.exists()


def test_on_paper_a_model_has_the_blocks_that_it_has_when_it_exists() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 11}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **keys))
    names = dict(model.named_parameters())
    found = shapes_on_paper(model, 5, 55, names)
    assert found.parameters == found.total == sum(p.numel() for p in names.values())
    kinds = {block.name: (block.form, block.groups, block.out, block.in_) for block in found.blocks}
    assert kinds["gpt_neox.layers.1.mlp.dense_h_to_4h"] == ("linear", 1, 16, 9)
    assert kinds["gpt_neox.embed_in"] == ("embedding", 1, 8, 11)
    assert {block.positions for block in found.blocks} == {5}
    tied = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert len(shapes_on_paper(tied, 1, 4, dict(tied.named_parameters())).blocks) == 1


@pytest.mark.parametrize(("name", "parameters"), [("plan-pythia", 2_775_208_960), ("plan-70b", 68_976_648_192)])
def test_large_models_are_planned_without_weights_and_never_run(
    name: str, parameters: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "docs" / "examples" / f"{name}.toml"
    paper = on_paper(request_of(load_config(config)))
    assert paper.shapes.total == parameters
    assert math.isclose(paper.shapes.parameters, parameters)
    fewer = on_paper(request_of(load_config(config, ['modules=["mlp"]'])))
    assert fewer.shapes.parameters < 0.9 * parameters
    assert status(["plan", str(config)]) == BAD_INPUT
    assert "give --flops" in capsys.readouterr().err
    if name == "plan-pythia":
        assert status(["run", str(config), "--store", str(tmp_path), "--set", 'cluster={kind="local"}']) == BAD_INPUT


def test_multistage_is_planned_as_its_inverse_is(tmp_path: Path) -> None:
    stage = 'proximity = 1e-3\nfisher = "exact"\ninverse = "INVERSE"\npretraining = {problem = "tda.problems.digits:Digits"}\n'
    text = DIGITS.replace("[cluster]", f'[[methods]]\nname = "multistage"\n{stage}[cluster]')
    flops = {}
    for inverse in ("ekfac", "cg"):
        (tmp_path / "run.toml").write_text(text.replace("INVERSE", inverse))
        found = {each.name: each.flops for each in planned(tmp_path / "run.toml")}
        flops |= {inverse: found["directions (multistage)"], "alone": found["directions (ekfac)"]}
    assert flops["ekfac"] == flops["alone"]
    assert flops["cg"] > 10 * flops["alone"]


def test_durations_are_told_as_people_would() -> None:
    assert [duration(hours) for hours in (0.001, 0.5, 30, 480)] == ["3.6 s", "30 min", "30 hours", "20 days"]
