"""The Dockerfiles, read and linted; nothing is built. test_images.py builds and runs them."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from tests.conftest import ROOT

DOCKERFILES = sorted(ROOT.glob("containers/*/Dockerfile"))
LABELS = {"title", "description", "version", "revision", "source", "licenses"}
STAGES = ["${BASE} AS wanted", "${BASE} AS packages", "packages AS code", "${BASE}"]
PIP_ARGUMENTS = ["PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"]

each = pytest.mark.parametrize("path", DOCKERFILES, ids=[p.parent.name for p in DOCKERFILES])


def load(path: Path) -> ModuleType:
    """A script as a module."""
    described = importlib.util.spec_from_file_location(path.stem, path)
    assert described is not None and described.loader is not None
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    return module


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", path.read_text(), flags=re.M)).splitlines()
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines if line)]


def last_stage(path: Path) -> list[tuple[str, str]]:
    """Instructions of the stage that becomes the image, without its FROM."""
    found = instructions(path)
    return found[max(i for i, (name, _) in enumerate(found) if name == "FROM") + 1 :]


def only(path: Path, name: str) -> str:
    """Arguments of an instruction that the last stage has once."""
    (found,) = [rest for kind, rest in last_stage(path) if kind == name]
    return found


def test_there_is_one_for_each_image_that_the_script_builds() -> None:
    images = load(ROOT / "scripts/images.py").IMAGES
    assert {p.parent.name for p in DOCKERFILES} == set(images)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in images:
        assert name in extras
        assert (ROOT / "containers" / name / "constraints.txt").exists()


@each
def test_hadolint_finds_nothing(path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "hadolint", "--no-color", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_can_find_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd /tmp && apt-get install curl\n")
    done = subprocess.run([Path(sys.executable).parent / "hadolint", bad], capture_output=True, text=True, check=False)
    assert done.returncode == 1


@each
def test_the_user_is_a_number_and_not_root(path: Path) -> None:
    user = only(path, "USER")
    assert re.fullmatch(r"[1-9]\d{3,}:\d+", user), "Kubernetes' runAsNonRoot only understands numbers"
    after = [name for name, _ in last_stage(path)]
    assert "RUN" not in after[after.index("USER") :]


@each
def test_nothing_is_downloaded_but_by_pip_with_the_environments_own_pins(path: Path) -> None:
    environment = path.parent.name
    runs = " ".join(rest for name, rest in instructions(path) if name == "RUN")
    assert not re.search(r"curl|wget|apt|git |http", runs)
    assert "ADD" not in {name for name, _ in instructions(path)}
    extras = next((rest for name, rest in instructions(path) if name == "ARG" and rest.startswith("EXTRAS=")), None)
    assert extras in (None, f"EXTRAS={environment}")
    wanted = environment if extras is None else "${EXTRAS}"
    assert f"environment.py requirements {wanted} >requirements.txt" in runs
    assert "pip install --no-compile -r requirements.txt -c constraints.txt" in runs
    copied = [rest for name, rest in instructions(path) if name == "COPY"]
    assert any(f"containers/{environment}/constraints.txt" in rest for rest in copied)
    assert not any(name == "RUN" and "pip" in rest for name, rest in last_stage(path))


@each
def test_the_base_is_an_argument_and_pips_settings_end_with_the_first_stage(path: Path) -> None:
    found = instructions(path)
    assert found[0] == ("ARG", "BASE=python:3.11-slim-bookworm")
    assert [rest for name, rest in found if name == "FROM"] == STAGES
    declared = [rest.partition("=")[0] for name, rest in found if name == "ARG"]
    assert [name for name in declared if name.startswith("PIP")] == PIP_ARGUMENTS
    assert {rest.partition("=")[0] for name, rest in last_stage(path) if name == "ARG"} == {
        "VERSION",
        "REVISION",
        "SOURCE",
    }


@each
def test_labels_health_and_entry_point(path: Path) -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', only(path, "LABEL")))
    assert set(labels) == LABELS
    assert labels["title"] == f"slipstream-{path.parent.name}"
    assert labels["source"] == "${SOURCE}"
    assert "CMD [" in only(path, "HEALTHCHECK")
    assert "slipstream" in only(path, "ENTRYPOINT") or "/entrypoint" in only(path, "ENTRYPOINT")


@each
def test_what_is_written_goes_to_volumes_and_tmp(path: Path) -> None:
    settings = dict(part.split("=", 1) for part in only(path, "ENV").split())
    volumes = only(path, "VOLUME").split()
    assert settings["SLIPSTREAM_HOME"] in volumes
    for variable in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        assert settings[variable].startswith(("/tmp", *volumes)), variable


def test_the_context_leaves_out_all_that_is_not_needed() -> None:
    lines = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x and not x.startswith("#")]
    assert lines[0] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert let_in == {"pyproject.toml", "README.md", "LICENSE", "tasks/slipstream", "dags", "containers"}
    copied = [rest.split()[:-1] for path in DOCKERFILES for name, rest in instructions(path) if name == "COPY"]
    for source in (s for parts in copied for s in parts if parts[0][:2] != "--"):
        assert source == "tasks" or source.startswith(tuple(let_in)), source


def test_requirements_are_the_cores_and_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = load(ROOT / "containers/environment.py").requirements("torch")
    assert [r for r in found if r.startswith(("boto3", "torch>", "pytest"))] == ["boto3>=1.40,<2", "torch>=2.13,<2.14"]


def test_unneeded_files_are_found_and_the_rest_is_left(tmp_path: Path) -> None:
    kept = ["numpy/core.py", "torch/bin/torch_shm_manager", "torch/nn/module.py", "mine/tests/test_it.py"]
    gone = ["numpy/lib/tests/test_x.py", "torch/bin/protoc", "torch/include/ATen/a.h", "onnx/backend/test/data/m.onnx"]
    for name in kept + gone:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = load(ROOT / "containers/environment.py").unneeded(tmp_path)
    covered = {n for n in kept + gone if any((tmp_path / n).is_relative_to(p) for p in found)}
    assert covered == set(gone)


def test_local_folders_of_pip_are_served_while_an_image_is_built(tmp_path: Path) -> None:
    import httpx

    images = load(ROOT / "scripts/images.py")
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/a.whl").write_text("wheel")
    (tmp_path / "pypi/simple/b").mkdir(parents=True)
    (tmp_path / "pypi/simple/b/index.html").write_text('<a href="../../files/b.whl">b</a>')
    (tmp_path / "pypi/files").mkdir()
    (tmp_path / "pypi/files/b.whl").write_text("other")
    elsewhere = "https://pypi.example/simple"
    settings = {
        "PIP_FIND_LINKS": f"{tmp_path}/wheels",
        "PIP_EXTRA_INDEX_URL": f"{elsewhere} file://{tmp_path}/pypi/simple",
    }
    with images.reachable(settings) as seen:
        assert httpx.get(f"{seen['PIP_FIND_LINKS']}a.whl").text == "wheel"
        first, second = seen["PIP_EXTRA_INDEX_URL"].split()
        assert first == elsewhere
        assert httpx.get(f"{second}/b/../../files/b.whl").text == "other"
        assert httpx.get(f"{second}/b/").text.startswith("<a href")
    with pytest.raises(httpx.ConnectError):
        httpx.get(seen["PIP_FIND_LINKS"])
