"""The certificates with which the processes of a cluster know each other.

    python -m infra.certificates FOLDER     # ca.pem, cert.pem, key.pem for one cluster, for a year; those that are there stay

The authority of such a pair is the certificate itself: who has the key may join the cluster and give it work. Where certificates are to be
given out one by one, use an authority of your own (docs/clusters.md).
"""

import sys
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
        file = folder / f"{name}.pem"
        file.touch(mode=0o600)
        file.write_text(text)
    return Tls(**{name: str(folder / f"{name}.pem") for name in Tls.model_fields})


def main(arguments: list[str]) -> int:
    """Write a pair into a folder that has none; the exit status."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: python -m infra.certificates FOLDER\n")
        return 2
    folder = Path(arguments[0])
    there = [name for name in Tls.model_fields if (folder / f"{name}.pem").exists()]
    if there and len(there) < len(Tls.model_fields):
        sys.stderr.write(f"{folder} has {', '.join(f'{name}.pem' for name in there)} alone; remove it, or name another folder\n")
        return 2
    if not there:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary_files(folder)
        except OSError as error:
            sys.stderr.write(f"{error.filename}: {error.strerror}; name a folder that can be written to\n")
            return 2
    sys.stdout.write(f"{'kept' if there else 'written'}: {', '.join(str(folder / f'{name}.pem') for name in Tls.model_fields)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
