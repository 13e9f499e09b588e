"""The key and its signatures; what is believed because of them is tested in test_tracking.py and test_registry.py."""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from slipstream import spec as specs
from slipstream.contract import Artifact, Cell, StepInput, StepOutput, Verdict
from slipstream.errors import DataError, InputError
from slipstream.home import Home
from slipstream.store import documents, signing

OUTPUT = StepOutput(
    step="build",
    cell=Cell(recipe="int8", target="server"),
    identity="a" * 64,
    run_id="run-1",
    artifact=Artifact(uri="mlflow-artifacts:/1", path="data/engine", sha256="b" * 64, size_bytes=1),
    metrics={"whole": 1, "part": 0.1},
    verdicts=(Verdict(gate="accuracy", answer="pass", reason="drop 0.1", estimate=1, n=10),),
    details={"nested": {"number": float("nan"), "list": (1, 2.0)}},
)
OTHERS = {
    "step": "validate",
    "cell": Cell(recipe="int8", target="other"),
    "identity": "c" * 64,
    "run_id": "run-2",
    "reused": True,
    "artifact": None,
    "metrics": {"whole": 2.0},
    "verdicts": (),
    "details": {},
}


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(signing.VARIABLE, raising=False)


def test_the_key_of_a_home_is_made_once_and_for_its_owner_alone(home: Path) -> None:
    made = signing.sign("a", {"x": 1})
    path = signing.key_file(Home.from_environment())
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_text()) == 64
    assert signing.sign("a", {"x": 1}) == made
    assert sorted(p.name for p in home.iterdir()) == [signing.FILE]


def test_processes_that_start_at_once_agree_on_the_key(home: Path) -> None:
    code = "from slipstream.store import signing; print(signing.sign('a', 1))"

    def one(_: int) -> str:
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(one, range(8)))) == 1


def test_a_signature_is_for_one_purpose_one_document_and_one_key(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = signing.sign("step-output", {"a": 1, "b": [2]})
    assert signing.verify("step-output", {"b": [2], "a": 1}, signature)
    assert not signing.verify("version-artifact", {"a": 1, "b": [2]}, signature)
    assert not signing.verify("step-output", {"a": 1, "b": [3]}, signature)
    for wrong in ("", signature[:-1], signature.upper(), "é" * 64):
        assert not signing.verify("step-output", {"a": 1, "b": [2]}, wrong)
    monkeypatch.setenv(signing.VARIABLE, "f" * 64)
    assert not signing.verify("step-output", {"a": 1, "b": [2]}, signature)


def test_a_key_is_replaced_without_losing_what_the_old_one_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = "0" * 32, "1" * 32
    monkeypatch.setenv(signing.VARIABLE, old)
    before = signing.sign("a", 1)
    monkeypatch.setenv(signing.VARIABLE, f"{new},{old}")
    assert signing.verify("a", 1, before)
    after = signing.sign("a", 1)
    monkeypatch.setenv(signing.VARIABLE, new)
    assert signing.verify("a", 1, after)
    assert not signing.verify("a", 1, before)


@pytest.mark.parametrize("key", ["", "short", "0" * 64 + ","])
def test_a_key_that_could_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(signing.VARIABLE, key)
    with pytest.raises(InputError, match=rf"^{signing.VARIABLE}: a signing key has at least 32 characters") as raised:
        signing.sign("a", 1)
    assert "0" * 64 not in str(raised.value)


def test_an_output_is_believed_after_any_number_of_journeys(home: Path) -> None:
    signed = signing.signed_output(OUTPUT)
    read = signed
    for _ in range(2):  # as OUT.json, in an IN.json, and as XCom
        read = StepOutput.model_validate_json(read.model_dump_json())
        signing.require_signed(read, "here")
        read = StepOutput.model_validate(read.model_dump(mode="json"))
        signing.require_signed(read, "here")


@pytest.mark.parametrize("field", OTHERS)
def test_no_field_of_a_signed_output_can_be_changed(home: Path, field: str) -> None:
    signed = signing.signed_output(OUTPUT)
    changed = signed.model_copy(update={field: OTHERS[field]})
    with pytest.raises(DataError, match=r"^here: the output of step \w+ has a signature of another key, or was chang"):
        signing.require_signed(changed, "here")


def test_a_step_believes_no_document_that_is_not_signed(home: Path, tmp_path: Path) -> None:
    spec = specs.load(Path(__file__).parents[1] / "specs" / "good-smallest.yaml")
    given, out = tmp_path / "in.json", tmp_path / "out.json"
    readers: dict[Path, Callable[[], StepInput]] = {
        given: lambda: documents.read(str(given)),
        out: lambda: documents.gather("select", spec, "r", "", [str(out)]),
    }
    for output in (OUTPUT, signing.signed_output(OUTPUT)):
        given.write_text(StepInput(run_key="r", upstream=(output,)).model_dump_json())
        out.write_text(output.model_dump_json())
        for path, read in readers.items():
            if output.signature:
                assert [o.step for o in read().upstream] == ["build"]
            else:
                with pytest.raises(DataError, match=f"^{path}: the output of step build has no signature"):
                    read()


def test_a_home_that_cannot_hold_a_key_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLIPSTREAM_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=rf"signing.key: the signing key cannot be read or made .*{signing.VARIABLE}"):
        signing.sign("a", 1)


def test_the_key_is_in_no_message(home: Path) -> None:
    signing.sign("a", 1)
    key = signing.key_file(Home.from_environment()).read_text()
    with pytest.raises(DataError) as raised:
        signing.require_signed(OUTPUT, "here")
    assert key not in str(raised.value)
    assert key not in os.environ.values()
