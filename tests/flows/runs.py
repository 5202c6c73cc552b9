"""A tiny problem with traps, written as a user would write one, and what tests of whole runs share."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import psutil

from flows.config import load_config
from tda import location

TDA = Path(sys.executable).with_name("tda")

# A trap is a file in the folder `traps`; it springs in worker processes only, so that the examination before a run passes by.
PROBLEM = """
import multiprocessing, os, time
from pathlib import Path
import torch
from torch import nn
import tda

class Data:
    def __init__(self, count, seed, traps):
        g = torch.Generator().manual_seed(seed)
        self.x, self.y, self.traps = torch.randn(count, 6, generator=g, dtype=torch.float64), torch.randint(3, (count,), generator=g), traps
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        if self.traps and multiprocessing.parent_process() is not None:
            spring(Path(self.traps), i)
            if (Path(self.traps) / f"nan-{i}").exists():
                return self.x[i] * torch.nan, self.y[i]
        return self.x[i], self.y[i]

def spring(folder, i):
    with (folder / "reads.log").open("a") as log:
        log.write(f"{i}\\n")
    if (folder / f"die-{i}").exists():
        (folder / f"die-{i}").unlink()
        os._exit(9)
    if (folder / f"fail-{i}").exists():
        raise RuntimeError(f"example {i} is cursed\\nreally")
    if (folder / f"misread-{i}").exists():
        raise OSError(5, "Input/output error")
    if (folder / "slow").exists():
        time.sleep(0.15)

class Tiny(tda.Problem):
    likelihood = tda.Categorical()
    def __init__(self, examples=23, queries=5, traps="", dtype="float64", seed=1):
        self.examples, self.queries, self.traps, self.dtype, self.seed = examples, queries, traps, dtype, seed
    def model(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
        return layers.to(getattr(torch, self.dtype))
    def train_data(self):
        return Data(self.examples, self.seed, self.traps)
    def query_data(self):
        return Data(self.queries, 2, "")
    def fit(self, model, dataset, *, seed, on_checkpoint):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step, i in enumerate(order.tolist(), 1):
            x, y = dataset.x[i], dataset.y[i]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[None].to(next(model.parameters()).dtype)), y[None]).backward()
            optimizer.step()
            if step % 3 == 0 or step == len(order):
                on_checkpoint(model=model, learning_rate=0.1, step=step)
"""

CONFIG = """
problem = "tiny.py:Tiny"
shard_size = 2
query_block = 3
[[methods]]
name = "graddot"
[[methods]]
name = "kfac"
fisher = "sampled"
[[methods]]
name = "ekfac"
fisher = "exact"
damping = 0.01
"""


def write_config(folder: Path, text: str = CONFIG, problem: str = PROBLEM) -> Path:
    """tiny.py and run.toml in a folder; the path of the second."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.py").write_text(textwrap.dedent(problem))
    (folder / "run.toml").write_text(textwrap.dedent(text))
    return folder / "run.toml"


def attribute(config: Path, store: str, *overrides: str):
    """Run in this process and open the result: (summary, run)."""
    import tda
    from flows.attribute import attribute_run

    summary = attribute_run(load_config(config, overrides, store), f"tda run {config}")
    return summary, tda.open_run(store, summary.run_id)


def command(*arguments: str, own_api: bool = False, marker: str = "", **options) -> subprocess.Popen[str]:
    """The command `tda`, as a process of its own; own_api: with a Prefect API of its own; marker: for `left_behind`."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "TDA_TEST": marker}
    if own_api:
        del env["PREFECT_API_URL"]
    return subprocess.Popen([TDA, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **options)


def finished(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def objects(url: str) -> dict[str, bytes]:
    """Every object below a URL, by its name there."""
    fs, path = fsspec.url_to_fs(url, **({"use_listings_cache": False} if url.startswith("s3:") else {}))
    return {name.removeprefix(f"{path}/"): fs.cat_file(name) for name in sorted(fs.find(path))}


def digests(run, *, but: tuple[str, ...] = ()) -> dict[str, str]:
    """sha256 of every object of a run's results and factors; the run's id, which holds the time, is taken out of the metadata."""
    found = {f"results.zarr/{name}": data for name, data in objects(f"{run.url}/results.zarr").items()}
    for key, fingerprint in run.manifest["fingerprints"]["factors"].items():
        url = location.join(run.store, "artifacts", "factors", fingerprint, "factors.zarr")
        found |= {f"{key}/{name}": data for name, data in objects(url).items()}
    return {name: hashlib.sha256(data.replace(run.id.encode(), b"RUN")).hexdigest() for name, data in found.items() if name not in but}


def reads(traps: Path) -> list[int]:
    """Which training examples workers have read, in order."""
    return [int(line) for line in (traps / "reads.log").read_text().split()]


def manifests(store: Path) -> dict[str, dict]:
    """run.json of every run in a folder, by id."""
    return {file.parent.name: json.loads(file.read_text()) for file in store.glob("runs/*/run.json")}


def left_behind(marker: str) -> list[str]:
    """Command lines of living processes, other than this one, whose environment holds a marker."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("TDA_TEST") == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def wait_until(condition: Callable[[], bool], process: object = None, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, f"it has ended: {process.communicate()}"  # type: ignore[attr-defined]
        time.sleep(0.01)


def written(store: Path) -> int:
    """How many whole objects a store holds."""
    # os.walk passes over folders that vanish meanwhile.
    return sum(not name.endswith(".partial") for _, _, names in os.walk(store) for name in names)
