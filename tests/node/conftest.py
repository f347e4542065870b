"""A node for the tests: as many ranks as asked for, on the GPUs there are."""

import mps
import pytest
import ranks


@pytest.fixture(scope="session")
def service():
    with mps.service() as environ_of:
        yield environ_of


@pytest.fixture
def node(service):
    """`ranks.run` with GPUs."""

    def run(num_ranks, function, *args, environ=None, **kwargs):
        environ = {**service(num_ranks), **(environ or {})}
        try:
            return ranks.run(num_ranks, function, *args, environ=environ, **kwargs)
        except ranks.RanksFailedError:
            ranks.close()  # some may wait for others still
            raise

    return run
