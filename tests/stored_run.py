"""A complete run with made-up scores, written the way the tasks write one: for tests of what reads runs."""

import json

import fsspec
import numpy as np

from tda import location, schema

SKIPPED = {"name": "attention", "parameters": 4096, "reason": "nn.MultiheadAttention's fused path has no per-layer inputs"}


def write_run(
    store,
    run_id="2026-11-22-0200-digits",
    *,
    created="2026-11-22T02:00:00+00:00",
    methods=("ekfac", "graddot"),
    queries=12,
    train=60,
    complete=True,
    labels=True,
    chunks=(1, 4, 16),
    better="lower",
    seed=0,
    sealed=True,
    **manifest,
):
    """Write the run into `store` (any URL) and return its own URL; further keywords replace keys of its manifest."""
    url = location.join(location.resolve(str(store)), "runs", run_id)
    rng = np.random.default_rng(seed)
    group = location.open_group(location.join(url, "results.zarr"), "w")
    measurement = {"name": "loss" if better == "lower" else "margin", "better": better}
    group.attrs.update(
        schema_version=schema.SCHEMA_VERSION,
        run_id=run_id,
        methods=list(methods),
        sign=schema.SIGN,
        units=schema.UNITS,
        measurement=measurement,
    )
    scales = np.array([10.0**-i for i in range(len(methods))])[:, None, None]
    # Heavy tails around 0, as influences have.
    influence = rng.standard_t(2.5, (len(methods), queries, train)) * scales * 1e-3
    arrays = {
        "method": (np.array(methods), None),
        "query": (np.arange(queries), None),
        "train": (np.arange(train), None),
        "influence": (influence, chunks),
        "self_influence": (-np.abs(rng.standard_t(2.5, (len(methods), train))) * scales[:, :, 0] * 1e-2, (1, chunks[2])),
        "train_loss": (rng.exponential(0.1, train), None),
        "query_measurement": (rng.exponential(0.3, queries), None),
    }
    if labels:
        arrays |= {"query_label": (np.arange(queries) % 10, None), "train_label": (np.arange(train) % 10, None)}
    for name, (values, chunk) in arrays.items():
        schema.create_array(group, name, values.shape, chunk)[...] = values.astype(str if name == "method" else None)
    if sealed:
        location.seal(location.join(url, "results.zarr"))
    write_factors(store, "f1", {"fc1": (16, 65), "fc2": (10, 17)})
    content = _manifest(run_id, created, methods, queries, train, measurement, complete=complete) | manifest
    put(location.join(url, "run.json"), json.dumps(content).encode())
    return url


def write_factors(store, fingerprint, layers):
    """Factors of layers {name: (out, in)}, in the order of the manifest's coverage."""
    url = location.join(location.resolve(str(store)), "artifacts", "factors", fingerprint, "factors.zarr")
    group = location.open_group(url, "w")
    group.attrs["schema_version"] = schema.SCHEMA_VERSION
    for index, (rows, columns) in enumerate(layers.values()):
        shapes = {"eigenvalues": (1, rows, columns), "kfac_in": (1, columns), "kfac_out": (1, rows), "basis_in": (1, columns, columns)}
        for name, shape in shapes.items():
            schema.create_array(group, f"layers/{index}/{name}", shape, dtype="float64")[...] = np.full(shape, index + 1.0)
    location.seal(url)
    return url


def put(url, data):
    """Write one object without ceremony."""
    with fsspec.open(url, "wb", auto_mkdir=True) if url.startswith("file:") else fsspec.open(url, "wb", use_listings_cache=False) as file:
        file.write(data)


def _manifest(run_id, created, methods, queries, train, measurement, *, complete):
    layers = [
        {"name": "fc1", "kind": "Linear", "parameters": 1040, "shape": [16, 65], "positions": 1, "structure": "kronecker"},
        {"name": "fc2", "kind": "Linear", "parameters": 170, "shape": [10, 17], "positions": 1, "structure": "kronecker"},
        {
            "name": "norm",
            "kind": "LayerNorm",
            "parameters": 32,
            "shape": [32],
            "positions": 1,
            "structure": "diagonal",
            "note": "no Kronecker structure",
        },
    ]
    names = [layer["name"] for layer in layers]
    curved = [method for method in methods if "grad" not in method]
    return {
        "schema_version": schema.SCHEMA_VERSION,
        "run_id": run_id,
        "complete": complete,
        "created": created,
        "problem": "tda.problems.digits:Digits",
        "config": {"seed": 0, "dtype": "auto", "batch_size": 256, "methods": [{"name": method} for method in methods]},
        "versions": {"tda": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6", "zarr": "3.1.6", "python": "3.11.7"},
        "fingerprints": {
            "checkpoint": "c0ffee",
            "train_data": "d1",
            "query_data": "d2",
            "problem": "p1",
            "factors": {"sampled": "f1"},
            "run": "r1",
        },
        "seeds": {"run": 0, "fisher_labels": 0},
        "measurement": measurement,
        "coverage": {"parameters": 5338, "attributed": 1242, "share": 1242 / 5338, "layers": layers, "skipped": [SKIPPED]},
        "damping": {method: {name: 10.0 ** -(3 + i) for i, name in enumerate(names)} for method in curved},
        "reused": {"checkpoint": True, "factors (sampled)": False},
        "layer_share": {method: {"fc1": 0.62, "fc2": 0.35, "norm": 0.03} for method in methods},
        "timings": {
            "checkpoint": {"wall": 0.4, "compute": 0.2},
            "eigendecompositions (sampled)": {"wall": 6.2, "compute": 5.1},
            "directions": {"wall": 0.8, "compute": 0.5},
            "scores": {"wall": 4.9, "compute": 4.4},
            "verify": {"wall": 0.3, "compute": 0.1},
            "total": {"wall": 14.2, "compute": 10.3},
        },
        "methods": list(methods),
        "shape": {"train": train, "query": queries},
        "noise": {"fisher": "one label drawn per training example"},
        "sign": schema.SIGN,
        "units": {method: "cosine, no unit" if method == "gradcos" else schema.UNITS for method in methods},
        "notes": ["products in float32"],
    }
