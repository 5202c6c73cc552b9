"""What a nightly run shows in Prefect's UI: its progress, the top influences, and where report and store are."""

from __future__ import annotations

import hashlib
import html
import json
import re
import time
from typing import TYPE_CHECKING, Any, Literal

from infra.masking import masked
from infra.settings import quiet_prefect
from tda.results import Run, open_run
from tda.rows import rows

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from flows.attribute import RunSummary
    from tda.problem import Problem

quiet_prefect()
from prefect import get_run_logger  # noqa: E402  (its settings are read at import)
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_progress_artifact, update_progress_artifact  # noqa: E402
from prefect.runtime import deployment, flow_run  # noqa: E402

SHOWN_QUERIES, SHOWN_EXAMPLES = 5, 3
LONGEST_TEXT = 36  # characters of an example in a cell
EVERY = 2.0  # seconds between two updates of the progress
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~>:@/])")


def key(part: str) -> str:
    """The key of an artifact: one per deployment and part, so that the UI shows how it changed from night to night.

    Keys have small letters, digits and dashes only: a name that has others gets a digest, or my_model and my-model would share a history.
    """
    name = str(deployment.name or f"by hand {json.dumps(flow_run.parameters, sort_keys=True, default=str)}")
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower() if deployment.name else "by hand").strip("-")
    mark = "" if slug == name else f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"tda-{slug or 'nightly'}{mark}-{part}"


class Follower:
    """A progress artifact: how far the stage under way is, of how many shards."""

    def __init__(self) -> None:
        """Make the artifact of the flow run of this context."""
        self._next = 0.0
        self._id: Any = None
        self._tried(lambda: create_progress_artifact(progress=0.0, key=key("progress"), description="the inputs are examined"))

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show it, unless that was done a moment ago."""
        if time.monotonic() >= self._next:
            self._show(100.0 * done / total, f"{plain(stage)}: {done} of {total} shards")
            self._next = time.monotonic() + EVERY

    def finish(self, run_id: str) -> None:
        """Show that all is done."""
        self._show(100.0, f"run {run_id} is complete")

    def _show(self, percent: float, text: str) -> None:
        made = self._id
        if made is not None:
            self._tried(lambda: update_progress_artifact(made, percent, description=masked(text)))

    def _tried(self, show: Callable[[], Any]) -> None:
        """A server that does not answer costs no run. show: gives the artifact's id."""
        try:
            self._id = show()
        except Exception as error:  # noqa: BLE001  (whatever it is, the numbers do not depend on it)
            self._id = None
            get_run_logger().warning("progress is not shown any more: %s", error)


def tell(done: RunSummary) -> None:
    """Make the artifacts of a finished run: a page of top influences, and links to its report and its store."""
    run = open_run(done.store, done.run_id)
    create_markdown_artifact(masked(page(run, done.reused)), key=key("top"), description="The most helpful and harmful training examples")
    create_link_artifact(done.report_url, link_text="report", key=key("report"), description=f"Report of run {done.run_id}")
    create_link_artifact(done.store, link_text="store", key=key("store"), description=f"tda.open_run({done.store!r}, {done.run_id!r})")


def page(run: Run, reused: Iterable[str]) -> str:
    """Markdown: for some queries the training examples at both ends of the default method's ranking, and what the run says of itself."""
    method, ids = run.default_method, rows(run).queries.tolist()
    problem = _problem(run)
    lines = [
        f"# Run {plain(run.id)}",
        "",
        f"Method {plain(method)}: {plain(str(run.manifest.get('units', {}).get(method, '')), None)}.",
        "",
        plain(str(run.manifest.get("sign", "")), None),
        "",
        "| query | most helpful | most harmful |",
        "|---|---|---|",
    ]
    for query in ids[:: max(1, len(ids) // SHOWN_QUERIES)][:SHOWN_QUERIES]:
        ends = [run.top(query, k=SHOWN_EXAMPLES, method=method, kind=kind).to_dict("records") for kind in ("helpful", "harmful")]
        cells = ["<br>".join(_example(row, problem) for row in found) for found in ends]
        lines.append(f"| {_named(query, 'query', problem)} | {cells[0]} | {cells[1]} |")
    lines += ["", f"Reused: {plain(', '.join(reused) or 'nothing')}."]
    lines += [f"- {plain(str(note), None)}" for note in run.manifest.get("notes", [])]
    return "\n".join(lines) + "\n"


def _example(row: Mapping[Hashable, Any], problem: Problem | None) -> str:
    label = f" (label {plain(str(row['label']))})" if "label" in row else ""
    return f"{plain(format(row['score'], '+.3g'))}: {_named(int(row['train']), 'train', problem, label)}"


def _named(i: int, split: Literal["train", "query"], problem: Problem | None, label: str = "") -> str:
    """An example's id, its label, and its beginning where it is a text."""
    told = problem.describe(split, i) if problem is not None else None
    return f"{i}{label} {plain(told)}" if isinstance(told, str) else f"{i}{label}"


def _problem(run: Run) -> Problem | None:
    from tda.problem import load_problem

    config = run.manifest["config"]
    return load_problem(config["problem"], config["problem_options"])


def plain(text: str, longest: int | None = LONGEST_TEXT) -> str:
    """A text that Markdown shows as it is, on one line: a training example may hold anything."""
    line = " ".join(masked(text).split())  # before anything is escaped or cut, which would hide a secret from the mask
    if longest is not None and len(line) > longest:
        line = line[: longest - 1] + "…"
    return _MARKDOWN.sub(r"\\\1", html.escape(line, quote=False))
