"""A question to another process gets its reply, whatever else is printed, or an error that says how it ended."""

import io
import subprocess
import sys

import pytest
from tests.conftest import ROOT
from tests.contract.answering import Doubled, Told

from slipstream.contract.ask import Unanswered, ask

MODULE, VARIABLES = "tests.contract.answering", {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("how", ["plainly", "noisily"])
def test_the_reply_is_no_part_of_what_the_process_prints(how: str) -> None:
    assert ask(MODULE, Told.model_validate({"how": how}), Doubled, variables=VARIABLES).how == how * 2


@pytest.mark.parametrize(
    ("how", "reason"),
    [("exit 0", "exit code 0: went away"), ("exit 3", "exit code 3: went away"), ("raise", "exit code 1: .*no idea")],
)
def test_a_process_without_a_reply_is_told_with_its_end(how: str, reason: str) -> None:
    with pytest.raises(Unanswered, match=f"(?s)tests.contract.answering in .* ended with {reason}"):
        ask(MODULE, Told.model_validate({"how": how}), Doubled, variables=VARIABLES)


def test_a_process_that_takes_too_long_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        ask(MODULE, Told(how="never"), Doubled, variables=VARIABLES, timeout_s=5)


def test_what_is_not_kept_goes_to_stderr_which_need_not_be_a_file(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert ask(MODULE, Told(how="noisily"), Doubled, variables=VARIABLES, quiet=False).how == "noisilynoisily"
    assert "{}" in capfd.readouterr().err
