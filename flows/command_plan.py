"""`tda plan`: what a run would take, before it is begun."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.arguments import Config, OtherStore, Overrides

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flows.cluster_config import ClusterConfig
    from flows.config import RunConfig
    from tasks.projected import Stage

HOUR = 3600.0


def plan(
    config: Config,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers; those of the file when absent.")] = None,
    flops: Annotated[float | None, typer.Option(help="Operations a second of a worker, such as 1e11; timed here when absent.")] = None,
    untimed: Annotated[bool, typer.Option("--untimed", help="From shapes alone: compute nothing, project no hours.")] = False,
    store: OtherStore = None,
    overrides: Overrides = None,
) -> None:
    """Say what a run would take: shards, memory, operations, bytes and hours of each stage; refuse what a worker cannot hold."""
    from flows.config import load_config
    from tda.errors import InputError

    parsed = load_config(config, overrides or [], store)
    if flops is not None and not 0 < flops < float("inf"):
        raise InputError(f"--flops {flops:g}: must be a number above 0, such as 1e11")

    from infra.settings import quiet_prefect

    quiet_prefect()
    from flows.attribute import request_of
    from tasks.planned import check_memory, on_paper, readable
    from tasks.projected import project
    from tasks.timed import measured_flops

    paper = on_paper(request_of(parsed))
    count = workers or parsed.cluster.workers
    limit = memory_limit(parsed.cluster, count)
    if limit is not None:
        check_memory(paper, count, limit)
    work = paper.work(count)
    stages, told = project(work), "given"
    if flops is None and not untimed:
        if paper.opened is None:
            raise InputError("a model on paper cannot be timed; give --flops, a worker's operations a second, or --untimed")
        flops, told = measured_flops(paper.opened, work), "timed on one shard"
    _print_stages(stages, count, flops)
    heaviest = max(stages, key=lambda stage: stage.peak)
    held = f"a worker has {readable(limit)}" if limit is not None else "what its workers have is for whoever started them"
    typer.echo(
        f"model    {work.shapes.parameters:,} of {work.shapes.total:,} parameters in {len(work.shapes.blocks)} blocks, {work.shapes.dtype}"
    )
    typer.echo(f"sizes    batch_size {work.batch}, shard_size {work.shard}, query_block {work.query_block}")
    typer.echo(f"memory   {readable(heaviest.peak)} a worker at most ({heaviest.name}); {held}")
    moved = sum(stage.read + stage.written for stage in stages)
    typer.echo(f"store    {readable(sum(stage.kept for stage in stages))} kept, {readable(moved)} moved, before compression")
    if flops is not None:
        total = sum(hours(stage, count, flops) or 0.0 for stage in stages)
        unknown = [stage.name for stage in stages if stage.flops is None]
        besides = f"; without {', '.join(unknown)}, which is the problem's own" if unknown else ""
        typer.echo(
            f"time     {duration(total)} with {count} workers of {flops:.2g} operations a second ({told}), once these have started{besides}"
        )

    for line in _left_out(parsed):
        typer.echo(f"but      {line}")


def _left_out(config: RunConfig) -> Iterator[str]:
    """What the table does not say of such a run."""
    if any(method.get("name") == "multistage" for method in config.methods):
        yield "the earlier stages of multistage are not in this plan"
    if config.candidates is not None:
        yield "all training examples are planned; the run scores its candidates alone, and what chooses them is not in this plan"


def memory_limit(cluster: ClusterConfig, workers: int) -> int | None:
    """Bytes of a worker; None where they are not this configuration's to say."""
    from dask.utils import parse_bytes
    from distributed.system import MEMORY_LIMIT

    if cluster.memory_limit is not None:
        return int(parse_bytes(cluster.memory_limit))
    return int(MEMORY_LIMIT // workers) if cluster.kind in ("local", "cuda") else None


def hours(stage: Stage, workers: int, flops: float) -> float | None:
    """Of a stage: as many rounds as its shards take."""
    from tasks.projected import SHARD_SECONDS

    if stage.flops is None:
        return None
    rounds = -(-stage.shards // workers)
    return rounds * (stage.flops / stage.shards / flops + SHARD_SECONDS) / HOUR


def duration(hours: float) -> str:
    """In the unit that people would use."""
    if hours < 1 / 60:
        return f"{hours * HOUR:.2g} s"
    return f"{hours * 60:.2g} min" if hours < 1 else f"{hours:,.3g} hours" if hours < 48 else f"{hours / 24:,.3g} days"


def _print_stages(stages: list[Stage], workers: int, flops: float | None) -> None:
    from flows.tables import print_table
    from tasks.planned import readable

    rows = []
    for stage in stages:
        operations = "?" if stage.flops is None else f"{stage.flops:.2g}" if stage.flops else "-"
        taken = None if flops is None else hours(stage, workers, flops)
        moved = [readable(count) if count else "-" for count in (stage.read, stage.written)]
        time = "?" if stage.flops is None else "" if taken is None else duration(taken)
        rows.append([stage.name, f"{stage.shards:,}", readable(stage.peak), operations, *moved, *([time] if flops is not None else [])])
    print_table(["stage", "shards", "memory", "operations", "read", "written", *(["time"] if flops is not None else [])], rows)
