"""The command line: exit codes, where output goes, and what it says when it cannot help."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream import cli, errors

ROOT = Path(__file__).parent.parent
SLIPSTREAM = Path(sys.executable).parent / "slipstream"


def slipstream(*arguments: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "NO_COLOR": "1", "COLUMNS": "110"}
    environment |= {"SLIPSTREAM_HOME": str(home)} if home else {}
    return subprocess.run(
        [str(SLIPSTREAM), *arguments],
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )


def test_help_names_every_command_and_the_exit_codes() -> None:
    done = slipstream("--help")
    assert done.returncode == 0
    for command in ("init", "validate", "schema", "step", "report", "up", "down", "status", "logs"):
        assert f" {command} " in done.stdout
    assert "Exit codes: 0 done, 1 failed" in " ".join(done.stdout.split())


def test_a_valid_spec() -> None:
    done = slipstream("validate", "examples/fashion.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "examples/fashion.yaml: valid; 3 recipes × 2 targets\n"


def test_a_bad_spec_exits_2_with_every_error_on_stderr() -> None:
    done = slipstream("validate", "tests/specs/bad-two-problems.yaml")
    assert done.returncode == errors.EXIT_INPUT
    assert done.stdout == ""
    assert "Bad spec: " in done.stderr
    assert "objective.metric" in done.stderr and "targets.server.threads" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_schema_is_json_on_stdout() -> None:
    done = slipstream("schema")
    assert json.loads(done.stdout)["title"] == "Spec"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("step", "fly", "--spec", "x", "--inputs", "y", "--outputs", "z"),
            "unknown step 'fly'; known: check, retrain",
        ),
        (
            ("step", "check", "--spec", "examples/fashion.yaml", "--inputs", "no.json", "--outputs", "z"),
            "no.json: cannot be read",
        ),
        (
            (
                "step",
                "build",
                "--spec",
                "examples/fashion.yaml",
                "--run-key",
                "r",
                "--cell",
                "zzz@yyy",
                "--outputs",
                "z",
            ),
            "--cell zzz@yyy: spec fashion has no recipe zzz; it has baseline, int8",
        ),
        (
            (
                "step",
                "build",
                "--spec",
                "examples/fashion.yaml",
                "--run-key",
                "r",
                "--cell",
                "int8@yy",
                "--outputs",
                "z",
            ),
            "--cell int8@yy: spec fashion has no target yy; it has server, portable",
        ),
        (
            ("step", "check", "--spec", "examples/fashion.yaml", "--run-key", "r", "--outputs", "z"),
            "step check needs the environment torch (",
        ),
    ],
)
def test_a_step_that_cannot_start_exits_2(arguments: tuple[str, ...], said: str) -> None:
    done = slipstream(*arguments)
    assert done.returncode == errors.EXIT_INPUT
    assert said in done.stderr


def test_without_a_platform_a_report_is_unavailable_and_says_what_to_start(tmp_path: Path) -> None:
    done = slipstream("report", "fashion", home=tmp_path)
    assert done.returncode == errors.EXIT_RETRY
    assert "slipstream up" in done.stderr and done.stdout == ""


def test_usage_errors_exit_2() -> None:
    assert slipstream("validate").returncode == 2
    assert slipstream("no-such-command").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "examples/fashion.yaml", "--param", "max_drop=["), "--param max_drop=[: must be a number"),
        (("run", "examples/fashion.yaml", "--param", "max_drop=a"), "--param max_drop=a: must be a number"),
        (("compile", "examples/fashion.yaml", "--kfp", "/proc/x/y.yaml"), "there is no folder /proc/x"),
        (("schema", "--markdown", "x"), "unexpected extra argument"),
        (("validate", "/proc"), "/proc: cannot be read: Is a directory"),
        (("validate", "x" * 300), "cannot be read: File name too long"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exits_2(arguments: tuple[str, ...], said: str) -> None:
    done = slipstream(*arguments)
    assert done.returncode == errors.EXIT_INPUT
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x"), errors.EXIT_INPUT),
        (OSError(errno.EROFS, "Read-only file system", "/boot/x"), errors.EXIT_INPUT),
        (OSError(errno.ENOSPC, "No space left on device", "/full/x"), errors.EXIT_RETRY),
        (OSError(errno.ENOSPC, "No space left on device"), errors.EXIT_RETRY),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), errors.EXIT_RETRY),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: OSError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert error.strerror in capsys.readouterr().err
