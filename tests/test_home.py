"""Where things lie: the home's permissions, and DAGs and environments wherever the user's code is."""

import os
import shutil
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from slipstream import home as homes
from slipstream.errors import InputError
from slipstream.home import Home

ROOT = Path(__file__).parent.parent
SLIPSTREAM = Path(sys.executable).parent / "slipstream"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def home_at(path: Path) -> Home:
    return Home(path, ROOT / ".envs", ROOT)


def test_a_new_home_is_its_owners_alone(tmp_path: Path) -> None:
    home_at(tmp_path / "a" / "home").prepare()
    assert mode(tmp_path / "a" / "home") == 0o700


@pytest.mark.parametrize("holds", [(), ("platform.json", "logs"), ("settings.yaml",)])
def test_a_home_that_others_may_read_is_closed_to_them(tmp_path: Path, holds: tuple[str, ...]) -> None:
    folder = tmp_path / "home"
    folder.mkdir()
    folder.chmod(0o755)
    for name in holds:
        (folder / name).touch()
    home_at(folder).prepare()
    assert mode(folder) == 0o700


def test_a_shared_folder_with_other_files_is_never_closed_but_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "somebody-elses").touch()
    with pytest.raises(InputError, match="holds other files, and others may read it"):
        home_at(folder).prepare()
    assert mode(folder) == 0o755


@pytest.mark.parametrize("kind", ["a file", "below a file", "under /proc"])
def test_a_home_that_cannot_be_made_exits_2_with_a_message(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").touch()
    path = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "home",
        "under /proc": Path("/proc/slipstream"),
    }[kind]
    environment = {"PATH": "/usr/bin:/bin", "SLIPSTREAM_HOME": str(path), "SLIPSTREAM_ENVS": str(ROOT / ".envs")}
    done = subprocess.run(
        [str(SLIPSTREAM), "up"], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert f"SLIPSTREAM_HOME={path.resolve()} cannot be used: " in done.stderr
    assert "Traceback" not in done.stderr


def test_dags_are_those_of_the_installation_wherever_the_users_code_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slipstream.platform import addresses, airflow

    monkeypatch.setenv("SLIPSTREAM_CODE", str(tmp_path))
    home = replace(Home.from_environment(), root=tmp_path / "home")
    home.prepare()
    settings = airflow.settings(home, addresses.choose(home, set()), addresses.ensure_secrets(home))
    assert settings["AIRFLOW__CORE__DAGS_FOLDER"] == str(ROOT / "dags")


def test_environments_are_those_of_the_checkout_where_the_current_folder_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLIPSTREAM_ENVS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert Home.from_environment().envs == ROOT / ".envs"
    (tmp_path / ".envs").mkdir()
    assert Home.from_environment().envs == tmp_path / ".envs"


def test_a_wheel_brings_the_dags_along(tmp_path: Path) -> None:
    if homes.checkout() is None:
        pytest.skip("there is no checkout to build a wheel of")
    uv = Path(sys.executable).parent / "uv"
    source = tmp_path / "source"  # a build leaves files next to pyproject.toml
    for folder in ("tasks", "dags"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pins = {path.parent.name: path for path in (ROOT / "containers").glob("*/constraints.txt")}
    for environment, path in pins.items():
        (source / "containers" / environment).mkdir(parents=True)
        shutil.copy(path, source / "containers" / environment)
    subprocess.run(
        [str(uv), "build", "--wheel", "-q", "-o", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
        env=os.environ,
    )
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name.partition(".data/data/")[2] for name in names if ".data/data/" in name}
    expected = {f"share/slipstream/{path.relative_to(ROOT)}" for path in (ROOT / "dags").rglob("*.py")}
    expected |= {f"share/slipstream/constraints/{name}/constraints.txt" for name in pins if name != "core"}
    assert shipped == expected
    prefix = tmp_path / "prefix"
    # Not pip: with --prefix it uninstalls what its own environment has.
    install = [str(uv), "pip", "install", "-q", "--no-deps", "--offline", "--python", sys.executable]
    subprocess.run([*install, "--prefix", str(prefix), str(wheel)], check=True, capture_output=True)
    [packages] = prefix.glob("lib/python3*/site-packages")
    asked = subprocess.run(
        [sys.executable, "-c", "from slipstream import home; print(home.checkout(), home.dags_folder())"],
        env={"PYTHONPATH": str(packages)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.split() == ["None", str(prefix / "share" / "slipstream" / "dags")]


@pytest.mark.parametrize(
    "command",
    [("compile", "examples/fashion.yaml", "--kfp", "out.yaml"), ("bench", "examples/fashion.yaml")],
    ids=lambda command: command[0],
)
def test_a_command_without_its_environment_says_so(tmp_path: Path, command: tuple[str, ...]) -> None:
    arguments = [str(ROOT / a) if a.startswith("examples/") else a for a in command]
    environment = {
        "PATH": "/usr/bin:/bin",
        "SLIPSTREAM_HOME": str(tmp_path / "home"),
        "SLIPSTREAM_ENVS": str(tmp_path / "no-envs"),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [str(SLIPSTREAM), *arguments], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert "needs the environment" in done.stderr and "SLIPSTREAM_ENVS" in done.stderr
    assert "Traceback" not in done.stderr
