"""docs/extending.md is true: what it builds is found, runs through the pipeline, and passes the contract suites."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.extension import package

SLIPSTREAM = str(Path(sys.executable).with_name("slipstream"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.write(tmp_path_factory.mktemp("warp"))


@pytest.fixture(scope="module")
def site(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package.install(source, tmp_path_factory.mktemp("site"))


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = package.environment(site)
    return subprocess.run(command, env=environment, cwd=package.ROOT, capture_output=True, text=True, check=False)


def test_the_spec_knows_the_names_the_options_and_the_settings(site: Path, tmp_path: Path) -> None:
    schema = json.loads(run(site, SLIPSTREAM, "schema").stdout)
    assert set(schema["$defs"]["Truncate"]["properties"]) == {"bits"}
    assert "truncate" in json.dumps(schema["properties"]["recipes"])
    assert "fewer bits of mantissa" in run(site, SLIPSTREAM, "schema", "--markdown").stdout
    spec = tmp_path / "spec.yaml"
    text = (package.ROOT / "examples/fashion.yaml").read_text()
    spec.write_text(text.replace("engine: onnxruntime", "engine: warp") + "truncate: {bits: 40}\n")
    refused = run(site, SLIPSTREAM, "validate", str(spec))
    assert refused.returncode == 2 and "truncate.bits: must be less than or equal to 23, not 40" in refused.stderr
    spec.write_text(spec.read_text().replace("bits: 40", "bits: 4"))
    assert run(site, SLIPSTREAM, "validate", str(spec)).returncode == 0
    without = subprocess.run([SLIPSTREAM, "validate", str(spec)], capture_output=True, text=True, check=False)
    assert without.returncode == 2 and "unknown engine 'warp'" in without.stderr


def test_a_whole_accuracy_validation_uses_all_of_it(site: Path, mlflow_server: str, home: Path) -> None:
    completed = run(site, sys.executable, "-m", "tests.extension.whole_run")
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout.splitlines()[-1])
    assert result["engine"] == "warp"
    assert 0.9 < result["figures"]["truncate short"]["truncated_share"] <= 1
    assert result["figures"]["quantize short"]["quantized_share"] > 0.9
    assert {"top3", "baseline_top3"} & set(result["figures"]["validate short@ours"])


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_contract_suites_pass(site: Path, source: Path, tmp_path: Path, which: str) -> None:
    suite = str(source / "tests" / "test_warp.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-p",
        "tests.engines.conftest",
        "-c",
        str(package.ROOT / "pyproject.toml"),
    ]
    completed = run(
        site, *command, "--rootdir", str(package.ROOT), "--basetemp", str(tmp_path / "own"), "-m", which, suite
    )
    assert completed.returncode == 0, completed.stdout
    assert "skipped" not in completed.stdout.splitlines()[-1]


def test_an_entry_that_breaks_or_is_taken_is_left_out_and_all_else_goes_on(source: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "broken-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[slipstream.engines]\nopenvino = broken:ENGINE\ngone = nowhere:ENGINE\nexits = broken_exit:ENGINE\n"
        "odd = os:sep\nNo-Name = os:sep\n[slipstream.techniques]\nfold = broken:FOLD\n"
    )
    (site / "broken.py").write_text(
        "from slipstream import EngineInfo, TechniqueInfo\nENGINE = EngineInfo('broken')\n"
        "FOLD = TechniqueInfo('broken', section='nowhere:Fold')\n"
    )
    (site / "broken_exit.py").write_text("import sys\nsys.exit(0)\n")
    completed = run(site, SLIPSTREAM, "validate", "examples/fashion.yaml")
    assert completed.returncode == 0, completed.stderr
    message = " ".join(completed.stderr.split())
    assert "openvino = broken:ENGINE of broken is left out, since there is another of that name" in message
    assert "gone = nowhere:ENGINE of broken is left out, since it cannot be loaded: ModuleNotFoundError" in message
    assert "exits = broken_exit:ENGINE of broken is left out, since it cannot be loaded: SystemExit" in message
    assert "odd = os:sep of broken is left out, since it is a str, not a EngineInfo" in message
    assert "No-Name = os:sep of broken is left out, since its name must match" in message
    assert "technique fold is left out: nowhere:Fold: ModuleNotFoundError" in message
