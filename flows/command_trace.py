"""`tda evaluate` of a configuration whose evaluation table has kind = "tracing"."""

from typing import TYPE_CHECKING

import typer

from flows.arguments import readable

if TYPE_CHECKING:
    from flows.config import RunConfig


def evaluate_tracing(config: "RunConfig", command: str) -> None:
    """Train, score, rank, and print the league table."""
    from flows.trace import trace_run
    from tda.evaluated import read_results

    done = trace_run(config, command)
    _print_league(read_results(done.url))
    typer.echo(f"run      {done.run_id}")
    typer.echo(f"reused   {', '.join(done.reused) or 'nothing: all was computed'}")
    typer.echo(f"table    {readable(done.url)}/league.csv")
    typer.echo(f"page     {readable(done.url)}/report.html")
    typer.echo(f'open     import tda; run = tda.open_run("{readable(done.store)}", "{done.run_id}"); run.evaluation')


def _print_league(data: object) -> None:
    """Methods by their mean reciprocal rank, of each damping sweep the chosen one alone."""
    import xarray as xr

    from flows.tables import print_table
    from tasks.tracing_results import METRICS, ordered, row_of

    assert isinstance(data, xr.Dataset)
    rows = [row_of(data, m) for m in ordered(data)]
    reported = int((~data["tuning_query"]).sum())
    heads = ["method", "damping", METRICS["mrr"], "of single trainings", METRICS["recall"], "behind the best"]
    table = [[row[name] for name in ("name", "damping", "mrr", "seeds", "recall", "behind")] for row in rows]
    print_table(heads, table, title=f"Fact tracing: {reported} reported queries, {data.sizes['seed']} trainings")
