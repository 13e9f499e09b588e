"""Fixtures of the release protocol."""

import pytest
from tests.release.ready import ERRORS, Ready, measure, ready_in
from tests.steps.stages import World, fake, quiet, world, world_maker

from slipstream.release import moves
from slipstream.traffic.fake import FakeController

__all__ = ["fake", "quiet", "world", "world_maker"]


@pytest.fixture
def ready(world: World, fake: FakeController) -> Ready:
    return ready_in(world, fake)


@pytest.fixture
def dead_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases run out at once, and no thread writes: a process that looks killed counts as killed."""
    monkeypatch.setattr(moves, "LEASE_S", 0.0)
    monkeypatch.setattr(moves, "RENEW_S", 600.0)


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every challenger passes its tests, and leases are not renewed: only the step's own thread writes."""
    monkeypatch.setattr(moves, "RENEW_S", 600.0)
    measure(monkeypatch, lambda: ERRORS)
