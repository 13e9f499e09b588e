from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.traffic.contract import TrafficContract

from slipstream.traffic.fake import FakeController


class TestFake(TrafficContract):
    requests_during_change = 700  # at 300 a second, long enough for all the changes

    @pytest.fixture
    def control(self, tmp_path: Path) -> Iterator[FakeController]:
        fake = FakeController(tmp_path)
        yield fake
        fake.close()
