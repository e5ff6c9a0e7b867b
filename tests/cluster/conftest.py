"""One Ray for all of these tests, because each start takes seconds."""

from collections.abc import Iterator

import pytest

from tests.helpers.cluster import Cluster, two_cores


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with two_cores(tmp_path_factory.mktemp("cache")) as started:
        yield started
