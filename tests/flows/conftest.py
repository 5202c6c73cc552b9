"""One Prefect API and one Dask cluster for all runs of a test session; neither is the user's."""

from collections.abc import Iterator

import pytest
from distributed import Client

from infra.cluster import ClusterSpec, open_cluster
from infra.cluster_spec import Tls
from infra.prefect_api import embedded_api
from infra.settings import quiet_prefect
from tests.certificates import certificates


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prefect with an empty database, for this process and for those that it starts."""
    quiet_prefect()  # before the first import of Prefect
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.delenv("PREFECT_API_URL", raising=False)
        with temporary_settings({PREFECT_HOME: home}, restore_defaults=[PREFECT_API_URL]), embedded_api() as api, api.used():
            patch.setenv("PREFECT_API_URL", PREFECT_API_URL.value())
            yield


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """Certificates by which runs and workers know each other."""
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def cluster(prefect_api: None, tls: Tls) -> Iterator[str]:
    """Two workers that stay; the override that makes a run use them."""
    with open_cluster(ClusterSpec(workers=2, tls=tls)) as client:
        yield at_address(client, tls)


@pytest.fixture(scope="session")
def single(prefect_api: None, tls: Tls) -> Iterator[str]:
    """One worker that stays; the override that makes a run use it."""
    with open_cluster(ClusterSpec(workers=1, tls=tls)) as client:
        yield at_address(client, tls)


def at_address(client: Client, tls: Tls) -> str:
    """The override that makes a run use a cluster."""
    files = f'{{ca="{tls.ca}", cert="{tls.cert}", key="{tls.key}"}}'
    return f'cluster={{kind="address", address="{client.scheduler.address}", tls={files}}}'
