"""What each method of a run cost, in seconds of work: its fits, its directions, and its part of the pass that scores all methods.

As if each were alone: a fit that several methods share counts for each of them. Training is not counted, since all need it.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from tasks import layout
from tda import location
from tda.methods import parse_all
from tda.methods.sweep import expand
from tda.results import Run

#: What the artifacts of fits are called.
_KINDS = {"kronecker": "factors", "dense": "spectra", "projection": "projections", "retraining": "retraining", "chains": "trajectories"}


def compute_seconds(run: Run) -> np.ndarray[Any, Any]:
    """(method,) seconds over all models of an ensemble; NaN where an artifact does not say what it took."""
    methods = parse_all([swept.table for swept in expand(run.manifest["config"]["methods"])])
    prints = run.manifest["fingerprints"]
    members = run.manifest.get("members", [prints])
    total = np.zeros(len(methods))
    for member in members:
        for m, method in enumerate(methods):
            for fit in method.fits:
                mark = member.get("fits", {}).get(method.title, {}).get(fit.key)
                total[m] += _priced(run, _KINDS[fit.kind], mark) if mark else np.nan
            total[m] += _priced(run, "directions", member["directions"].get(method.title, ""))
    return total + _scoring(run, len(members)) / len(methods)


def _priced(run: Run, kind: str, mark: str) -> float:
    """Seconds of an artifact: 0 where there is none, NaN where it does not say, as where a try was interrupted."""
    if not mark:
        return 0.0
    url = location.join(layout.artifact(run.store, kind, mark), "seconds.json")
    found = location.read_json(url)["compute"] if location.exists(url) else None
    return float("nan") if found is None else float(found)


def _scoring(run: Run, members: int) -> float:
    """Seconds of the pass over the training examples, from its receipts."""
    folders = [location.join(run.url, *(("members", str(m)) if members > 1 else ()), "receipts", "scores") for m in range(members)]
    urls = [location.join(folder, name) for folder in folders for name in location.list_names(folder)]
    return float(sum(json.loads(location.read_bytes(url))["seconds"] for url in urls))
