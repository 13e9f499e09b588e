"""Homes whose programs never outlive their tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from slipstream.home import Home
from slipstream.platform import supervisor

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def platform_home(home: Path) -> Iterator[Home]:
    """A fresh home; supervisord and all that it started are stopped after the test."""
    made = Home.from_environment()
    yield made
    supervisor.shutdown(made)


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """One home for a file's tests that only add programs: supervisord takes 2 s to stop."""
    made = Home(tmp_path_factory.mktemp("home"), ROOT / ".envs", ROOT)
    yield made
    supervisor.shutdown(made)
