"""A project from nothing but the wheel: `slipstream new`, `setup`, `validate`, and the platform in its folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slipstream import spec as specs
from slipstream.data.user_code import user_function
from slipstream.errors import InputError
from slipstream.tools import new, setup

ROOT = Path(__file__).parents[2]
BUILDER = ROOT / ".envs/torch/bin/python"
"""Has pip and setuptools."""
PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("SLIPSTREAM_")}


def test_a_new_project_is_valid_and_names_functions_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = new.new(tmp_path / "my-model")
    spec = specs.load(tmp_path / "my-model/my-model.yaml")
    monkeypatch.setenv("SLIPSTREAM_CODE", str(tmp_path / "my-model"))
    assert all(callable(user_function(call)) for call in spec.functions.values())
    assert tmp_path / "my-model/.github/workflows/validate.yml" in files and len(files) == len(new.FILES)
    assert not [path for path in files if "$" in path.read_text() or "$" in path.name]
    assert setup.environments([spec]) == ["airflow", "serve", "torch"]


def test_nothing_is_written_over_and_a_name_must_be_a_specs(tmp_path: Path) -> None:
    new.new(tmp_path / "twice")
    with pytest.raises(InputError, match=r"twice\.yaml, .*there already"):
        new.new(tmp_path / "twice")
    with pytest.raises(InputError, match="'My Model' cannot be the name of a project"):
        new.new(tmp_path / "My Model")
    assert not (tmp_path / "My Model").exists()


def run(*command: str | Path, cwd: Path) -> str:
    completed = subprocess.run(
        list(map(str, command)), cwd=cwd, env=PLAIN, capture_output=True, text=True, check=False, timeout=900
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout + completed.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_alone_makes_a_project_that_starts(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    wheels = tmp_path / "wheels"
    run(BUILDER, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, source, cwd=tmp_path)
    (wheel,) = wheels.glob("*.whl")
    python, uv = tmp_path / "venv/bin/python", Path(sys.executable).with_name("uv")
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    pins = ROOT / "containers/core/constraints.txt"
    run(python, "-m", "pip", "install", "-q", wheel, "-c", pins, cwd=tmp_path)
    shutil.copy(uv, python.parent)  # pip alone does it too, and takes minutes
    slipstream, project = python.with_name("slipstream"), tmp_path / "my-model"
    run(slipstream, "new", "my-model", cwd=tmp_path)
    assert "my-model.yaml: valid" in run(slipstream, "validate", "my-model.yaml", cwd=project)
    assert "installing" in run(slipstream, "setup", "my-model.yaml", cwd=project)
    assert "installing" not in run(slipstream, "setup", "my-model.yaml", cwd=project)
    try:
        run(slipstream, "up", cwd=project)
        assert "airflow" in run(slipstream, "status", cwd=project)
    finally:
        run(slipstream, "down", cwd=project)
