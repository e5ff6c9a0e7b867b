"""One Ray for all of these tests, because each start takes seconds."""

from collections.abc import Iterator

import pytest

from tests.helpers.cluster import Cluster, two_cores


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with two_cores(tmp_path_factory.mktemp("cache")) as started:
        yield started


@pytest.fixture(autouse=True)
def no_command_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails takes no cores from the next ones."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").end_commands()
