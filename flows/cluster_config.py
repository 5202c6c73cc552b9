"""The [cluster] table of a configuration."""

import re
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, field_validator, model_validator

from flows.config_table import STRICT, Count, Text, shown
from infra.cluster_spec import ClusterSpec, Kind, Kubernetes, Slurm, Ssh, Tls

_SIZED = {"workers", "threads", "memory_limit"}
#: The keys that change something, by kind.
KEYS: dict[str, set[str]] = {
    "local": _SIZED,
    "cuda": {"threads", "memory_limit"},
    "address": {"address", "tls"},
    "slurm": {*_SIZED, "tls", "slurm"},
    "kubernetes": {*_SIZED, "kubernetes"},
    "ssh": {*_SIZED, "tls", "ssh"},
}
#: The keys that a kind cannot do without, and an example of each.
NEEDED = {
    "address": {"address": 'address = "tcp://HOST:8786"'},
    "slurm": {
        "memory_limit": 'memory_limit = "16GiB", what a job is given',
        "slurm": 'a table [cluster.slurm] with interface = "ib0"',
    },
    "kubernetes": {
        "memory_limit": 'memory_limit = "16GiB", what a pod is given',
        "kubernetes": 'a table [cluster.kubernetes] with image = "REGISTRY/NAME:TAG"',
    },
    "ssh": {"ssh": 'a table [cluster.ssh] with hosts = ["HOST", "HOST"]'},
}
WHY = {
    "address": "does not change the workers at cluster.address",
    "cuda": "does not change that there is one worker for each GPU (CUDA_VISIBLE_DEVICES chooses them)",
}


class ClusterConfig(BaseModel):
    """The [cluster] table; its keys are those of infra.cluster.ClusterSpec."""

    model_config = STRICT

    kind: Kind = "local"
    workers: Count = 2
    threads: Count = 1
    address: Text | None = None
    memory_limit: Any = None
    """Bytes or a text such as "4GiB" per worker; None: an equal share of the machine."""
    tls: Tls | None = None
    slurm: Slurm | None = None
    kubernetes: Kubernetes | None = None
    ssh: Ssh | None = None

    @field_validator("memory_limit")
    @classmethod
    def _memory_is_a_size(cls, value: Any) -> str | int | None:
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        if isinstance(value, str) and re.fullmatch(r"(?=.*[1-9])(\d+\.?\d*|\.\d+) ?([kKMGT]i?)?B", value):
            return value
        raise ValueError(f'cluster.memory_limit must be a number of bytes or a text such as "4GiB", got {shown(value)}')

    @field_validator("tls")
    @classmethod
    def _files_are_absolute(cls, tls: Tls | None) -> Tls | None:
        for key, file in tls.model_dump().items() if tls else ():
            if not Path(file).is_absolute():
                raise ValueError(f"cluster.tls.{key} must be an absolute path, the same on every host, got {shown(file)}")
        return tls

    @model_validator(mode="after")
    def _keys_go_with_their_kind(self) -> Self:
        for key, example in NEEDED.get(self.kind, {}).items():
            if getattr(self, key) is None:
                raise ValueError(f'cluster.kind = "{self.kind}" needs cluster.{key}; add {example}')
        fields = type(self).model_fields
        for key in fields.keys() - KEYS[self.kind] - {"kind"}:
            value = getattr(self, key)
            if value == fields[key].default:
                continue
            if key in _SIZED:
                raise ValueError(f'cluster.{key} {WHY[self.kind]}; remove it, or use cluster.kind = "local"')
            kinds = " or ".join(f'"{kind}"' for kind, keys in KEYS.items() if key in keys)
            said = f' = "{value}"' if isinstance(value, str) else ""
            raise ValueError(f"cluster.{key}{said} is used only with cluster.kind = {kinds}; set it or remove cluster.{key}")
        if self.slurm and (self.slurm.interface is None) == (self.slurm.host is None):
            raise ValueError(
                "cluster.slurm needs either interface or host, where the jobs reach this machine's scheduler; "
                'add interface = "ib0", as `ip address` lists it on the nodes too'
            )
        return self

    def spec(self) -> ClusterSpec:
        """As infra.cluster.open_cluster takes it."""
        return ClusterSpec(**{key: getattr(self, key) for key in type(self).model_fields})
