"""The command `tda`: run attributions, look at results, find out what is wrong with an installation.

Exit status: 0 done; 2 the user's input is wrong, told in one line; 1 a run failed. Heavy imports wait inside the commands.
"""

import atexit
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from flows import command_nightly, command_plan, command_prune
from flows.arguments import DEFAULT_STORE, Config, OtherStore, Overrides, RunId, Store, readable, same
from flows.command_verify import verify
from infra import interrupts
from infra.masking import mask_logs, masked

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from flows.attribute import RunSummary
    from tda.results import Run

app = typer.Typer(help="Which training examples made the model do that?", add_completion=False, pretty_exceptions_enable=False)

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
SHOWN_QUERIES, SHOWN_EXAMPLES = 3, 3


def main() -> None:
    """Entry point: run a command and turn every expected error into one line on standard error."""
    atexit.register(gc.freeze)  # else the interpreter spends seconds on a last collection of torch, Prefect and Dask
    mask_logs()
    interrupts.hear()
    sys.exit(status(sys.argv[1:]))


def status(arguments: list[str]) -> int:
    """Run one command line; its exit status."""
    # A problem may be a module where the user stands, also for the worker processes; but a tasks.py there is not our `tasks`.
    sys.path += [folder for folder in (str(Path(__file__).parents[1]), os.getcwd()) if folder not in sys.path]  # noqa: PTH109
    try:
        returned = app(arguments or ["--help"], prog_name="tda", standalone_mode=False)
    except TyperException as error:  # an unknown command or option, a missing argument
        return _fail(BAD_INPUT, f"{error.format_message().rstrip('.')}; `tda --help` lists what there is")
    except typer.Abort:
        returned = INTERRUPTED
    except Exception as error:
        from infra.settings import Settings

        code = _status_of(error)
        if code is None or Settings().traceback:  # a fault of ours: the traceback is what a report needs
            raise
        return _fail(code, str(error))
    if returned == INTERRUPTED:  # Typer's way of passing Ctrl-C on
        return _fail(INTERRUPTED, "interrupted; the same command resumes")
    return returned if isinstance(returned, int) else 0


def _status_of(error: Exception) -> int | None:
    from infra.cluster import ClusterError, ShardFailed
    from infra.prefect_api import ApiError
    from infra.storage import StoreError
    from tda.errors import InputError

    if isinstance(error, InputError | StoreError | ClusterError | ApiError):
        return BAD_INPUT
    if type(error).__name__ == "NotStored":  # by name: its module imports xarray
        return BAD_INPUT
    # RunFailed by name: its module imports Prefect, and when it was raised that has happened anyway.
    return FAILED if isinstance(error, ShardFailed) or type(error).__name__ == "RunFailed" else None


def _fail(code: int, message: str) -> int:
    sys.stderr.write(f"tda: {masked(' '.join(message.split()))}\n")
    return code


@app.command()
def run(
    config: Config,
    store: OtherStore = None,
    overrides: Overrides = None,
) -> None:
    """Fit, score, publish; resumes what an earlier try left."""
    from flows.config import load_config

    parsed = load_config(config, overrides or [], store)  # before Prefect is imported: a slip is told at once

    from infra.settings import quiet_prefect

    quiet_prefect()
    from flows.attribute import attribute_run

    _print_summary(attribute_run(parsed, same("run", config, store, overrides)))


@app.command()
def evaluate(
    config: Annotated[str, typer.Argument(help="The run's TOML file; its evaluation table says how to evaluate.", metavar="CONFIG")],
    store: OtherStore = None,
    overrides: Overrides = None,
) -> None:
    """Retrain on subsets, or trace facts, and compare every method's predictions with it: one league table; resumes an earlier try."""
    from flows.config import load_config

    parsed = load_config(config, overrides or [], store)

    from infra.settings import quiet_prefect

    quiet_prefect()
    if parsed.evaluation is not None and parsed.evaluation.kind == "tracing":
        from flows.command_trace import evaluate_tracing

        evaluate_tracing(parsed, same("evaluate", config, store, overrides))
        return
    from flows.evaluate import evaluate_run
    from flows.league import print_league
    from tda.results import open_run

    done = evaluate_run(parsed, same("evaluate", config, store, overrides))
    print_league(open_run(done.store, done.run_id).evaluation)
    typer.echo(f"run      {done.run_id}")
    typer.echo(f"reused   {', '.join(done.reused) or 'nothing: all was computed'}")
    typer.echo(f"table    {readable(done.url)}/league.csv")
    typer.echo(f"page     {readable(done.url)}/report.html")
    typer.echo(f'open     import tda; run = tda.open_run("{readable(done.store)}", "{done.run_id}"); run.evaluation')


@app.command()
def sample(
    config: Config,
    tune: Annotated[bool, typer.Option("--tune", help="Choose step size, localization and lengths, say why, and sample nothing.")] = False,
    store: OtherStore = None,
    overrides: Overrides = None,
) -> None:
    """Run the SGLD chains of a configuration alone, and judge them; `tda run` then reuses them."""
    from flows.config import load_config

    parsed = load_config(config, overrides or [], store)

    from infra.settings import quiet_prefect

    quiet_prefect()
    from flows.chains import print_sampled, print_tuned
    from flows.sample import sample_run

    command = same("sample", config, store, overrides)
    found = sample_run(parsed, f"{command} --tune" if tune else command, tune=tune)
    if tune:
        print_tuned(found)
    else:
        print_sampled(found)


@app.command()
def decompose(
    config: Annotated[str, typer.Argument(help="The study's TOML file.", metavar="CONFIG")],
    store: OtherStore = None,
    overrides: Overrides = None,
) -> None:
    """Study the curvature ladder, from the Hessian to K-FAC: what each step costs; resumes what an earlier try left."""
    from flows.study import load_study

    parsed = load_study(config, overrides or [], store)

    from infra.settings import quiet_prefect

    quiet_prefect()
    from flows.decompose import decompose_study

    done = decompose_study(parsed, same("decompose", config, store, overrides))
    typer.echo(f"study    {done.study_id}")
    typer.echo(f"points   {done.points} measured ({done.reused} of them reused), {len(done.refused)} left out")
    for line in done.refused:
        typer.echo(f"         {line}")
    typer.echo(f"report   {readable(done.report_url)}")
    typer.echo(f'open     import tda; study = tda.open_study("{readable(done.store)}", "{done.study_id}")')


@app.command()
def runs(store: Store = DEFAULT_STORE) -> None:
    """List the runs of a store, newest first."""
    from flows.tables import cell, print_table
    from tda.results import list_runs

    table = list_runs(store)
    if table.empty:
        typer.echo(f"no runs in {store}; `tda run CONFIG` makes one")
        return
    rows = [[cell(value) for value in row] for row in table.itertuples(index=False)]
    print_table(list(table.columns), rows)


@app.command()
def show(run: RunId = "latest", store: Store = DEFAULT_STORE) -> None:
    """Print a run's manifest: coverage, sign and unit, damping, versions, seeds, what was reused, timings."""
    from flows.tables import print_manifest
    from tda.results import open_run

    print_manifest(open_run(store, run, incomplete=True).manifest)


@app.command()
def top(
    query: Annotated[int, typer.Option("--query", "-q", help="The query's id.")],
    run: RunId = "latest",
    k: Annotated[int, typer.Option("-k", min=1, help="How many training examples.")] = 10,
    method: Annotated[str | None, typer.Option(help="A method's label; the last of the configuration when absent.")] = None,
    kind: Annotated[Literal["helpful", "harmful"], typer.Option(help="Which end of the ranking.")] = "helpful",
    on: Annotated[str | None, typer.Option(help='Another training set that a method attributes to, such as "pretraining".')] = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """The training examples that helped, or harmed, a query most."""
    from flows.tables import cell, print_table
    from tda.results import open_run

    table = open_run(store, run).top(query, k=k, method=method, kind=kind, on=on)
    print_table(list(table.columns), [[cell(value) for value in row] for row in table.itertuples(index=False)])
    if "of" in table.attrs:
        typer.echo(f"of {table.attrs['of']}; others were not scored")


@app.command()
def report(
    run: RunId = "latest",
    output: Annotated[str | None, typer.Option("--output", "-o", help="Copy the page to this file.", metavar="FILE")] = None,
    store: Store = DEFAULT_STORE,
) -> None:
    """Say where a run's report is, or copy it from the store."""
    from tda.errors import InputError
    from tda.location import exists, join, read_bytes
    from tda.results import open_run

    opened = open_run(store, run)
    url = join(opened.url, "report.html")
    if not exists(url):
        raise InputError(f"run {opened.id} has no report at {url}; run its config again to publish one")
    if output is not None:
        try:
            Path(output).write_bytes(read_bytes(url))
        except OSError as error:
            raise InputError(f"--output {output}: {error.strerror}; choose a file that can be written") from error
    typer.echo(output or readable(url))


@app.command()
def doctor(store: Store = DEFAULT_STORE) -> int:
    """Check storage, cluster, Prefect and GPU, and say what to mend."""
    from flows.doctor import examine, print_findings

    return 0 if print_findings(examine(store)) else FAILED


app.command()(command_nightly.nightly)
app.command()(command_prune.prune)
app.command()(verify)
app.command()(command_plan.plan)


def _print_summary(summary: "RunSummary") -> None:
    from tda.results import open_run

    opened = open_run(summary.store, summary.run_id)
    _print_examples(opened)
    typer.echo(f"\nrun      {summary.run_id}")
    typer.echo(f"reused   {', '.join(summary.reused) or 'nothing: all was computed'}")
    for title, told in opened.manifest.get("sampling", {}).items():
        typer.echo(f"chains   {title}: {_verdict(told)}")
    typer.echo(f"report   {readable(summary.report_url)}")
    typer.echo(f'open     import tda; run = tda.open_run("{readable(summary.store)}", "{summary.run_id}")')


def _verdict(told: "Mapping[str, Any]") -> str:
    from flows.chains import uncertain, verdict

    said = [line for each in (told, *told.get("members", [])) for line in each["verdict"]]
    signs = f"{uncertain(told)} of the scores are of uncertain sign"
    return f"{verdict({'verdict': said})}; {signs}{'; see the report: ' if said else ''}{said[0] if said else ''}"


def _print_examples(opened: "Run") -> None:
    """For a few queries, spread over all, the training examples at both ends of the default method's ranking."""
    from flows.tables import print_table
    from tda.rows import rows as scores_of

    method, data = opened.default_method, scores_of(opened).data
    ids = data["query"].values.tolist()
    chosen = ids[:: max(1, len(ids) // SHOWN_QUERIES)][:SHOWN_QUERIES]
    labels = data.coords.get("query_label")
    rows = []
    for query in chosen:
        ends = [opened.top(query, k=SHOWN_EXAMPLES, method=method, kind=kind) for kind in ("helpful", "harmful")]
        label = "" if labels is None else f" (label {labels.sel(query=query).item()})"
        rows.append([f"{query}{label}", *("\n".join(map(_example, end.to_dict("records"))) for end in ends)])
    print_table(["query", "most helpful", "most harmful"], rows, title=f"{method}: training example (label) score")


def _example(row: "Mapping[Hashable, Any]") -> str:
    label = f" ({row['label']})" if "label" in row else ""
    return f"{row['train']}{label} {row['score']:+.3g}"
