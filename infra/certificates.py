"""The certificates with which the processes of a cluster know each other."""

from pathlib import Path
from typing import Any

from infra.cluster_spec import ClusterError, Tls


def files(tls: Tls | None) -> Any:
    """The files as Dask takes them; None: what its configuration says."""
    from distributed.security import Security

    if tls is None:
        return None
    for key, file in tls.model_dump().items():
        if not Path(file).is_file():
            raise ClusterError(f"cluster.tls.{key} = {file!r} is no file here; give the path of a PEM file")
    roles = ("client", "scheduler", "worker")
    pairs = {f"tls_{role}_{part}": getattr(tls, part) for role in roles for part in ("cert", "key")}
    return Security(require_encryption=True, tls_ca_file=tls.ca, **pairs)


def temporary_files(folder: Path) -> Tls:
    """A pair for one cluster, where its jobs find it and nobody else may look."""
    from distributed.security import Security

    pair = Security.temporary()
    for name, text in {"ca": pair.tls_ca_file, "cert": pair.tls_worker_cert, "key": pair.tls_worker_key}.items():
        (folder / f"{name}.pem").write_text(text)
    return Tls(**{name: str(folder / f"{name}.pem") for name in Tls.model_fields})
