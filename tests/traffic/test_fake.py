import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.traffic.contract import TrafficContract, load

from slipstream.traffic.base import Routes
from slipstream.traffic.fake import FakeController


class TestFake(TrafficContract):
    @pytest.fixture
    def control(self, tmp_path: Path) -> Iterator[FakeController]:
        fake = FakeController(tmp_path)
        yield fake
        fake.close()

    def test_connections_that_come_while_it_stalls_are_kept(
        self, two: FakeController, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        accept = two._server.process_request

        def stalled(*connection: Any) -> None:
            monkeypatch.undo()
            time.sleep(0.5)
            accept(*connection)

        two.set_routes("net", Routes(weights={"v1": 100}))
        monkeypatch.setattr(two._server, "process_request", stalled)
        assert [r.status for r in load(two, 120, rate=10_000).records] == [200] * 120
