"""How long `slipstream up` waits: as long as something moves."""

from pathlib import Path

import pytest

from slipstream.home import Home
from slipstream.platform import console, programs
from slipstream.platform.health import ServiceStatus
from slipstream.platform.lifecycle import SILENT_FOR_S, STARTS, _Patience


def service(name: str = "mlflow", state: str = "RUNNING", pid: int | None = 7) -> ServiceStatus:
    return ServiceStatus(name=name, state=state, pid=pid, address=None, memory_mib=0, healthy=False)


@pytest.fixture
def somewhere(tmp_path: Path) -> Home:
    (tmp_path / "logs").mkdir()
    return Home(tmp_path, tmp_path, tmp_path)


def test_services_are_given_up_after_a_long_silence_only(somewhere: Home) -> None:
    patience, missing = _Patience(somewhere), [service(), service("triggers")]
    assert patience.exhausted(missing, 0) == []
    assert patience.exhausted(missing, SILENT_FOR_S) == []
    assert patience.exhausted(missing, SILENT_FOR_S + 1) == missing


def test_a_log_that_grows_or_a_state_that_changes_is_waited_for(somewhere: Home) -> None:
    patience, now_s = _Patience(somewhere), 0.0
    log = programs.log_file(somewhere, "mlflow")
    for line in range(5):
        log.write_text("starting\n" * line)
        assert patience.exhausted([service()], now_s) == []
        now_s += SILENT_FOR_S - 1
    assert patience.exhausted([service(state="STARTING")], now_s) == []
    assert patience.exhausted([service(state="STARTING")], now_s + SILENT_FOR_S) == []


def test_a_service_that_ends_time_and_again_is_given_up_although_it_moves(somewhere: Home) -> None:
    patience, other = _Patience(somewhere), service("triggers")
    for start in range(STARTS):
        assert patience.exhausted([service(pid=start + 1), other], start) == []
    ending = service(pid=STARTS + 1)
    assert patience.exhausted([ending, other], STARTS) == [ending]


def test_up_says_what_it_waits_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "WAITING_EVERY_S", -1.0)
    with console._Progress() as progress:
        progress.show([service(), service("triggers", "STARTING")])
    assert "waiting for mlflow (running), triggers (starting)" in capsys.readouterr().err
