"""Tests of Megatron-Core share their ranks, which import it once."""

import pytest
import ranks


@pytest.fixture(scope="package", autouse=True)
def _ranks_of_their_own():
    """Whatever Megatron-Core leaves in the ranks' processes must not burden other tests."""
    yield
    ranks.close()
