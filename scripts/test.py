"""Runs the tests, each part in the environment that it needs: `scripts/test.py [slow] [PART ...]`.

Tests that are marked `slow` run only with the word `slow`, which leaves out the others.

Three parts run at a time, since most of them wait more than they compute; what measures comes first, and the others
give way to it. Ends with one line that sums up all parts, and exits 1 when anything failed.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent

STAGES = tuple(f"tests/steps/test_{step}.py" for step in ("trial", "rollout", "rollback", "report"))
TABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "e2e": (".venv", ("tests/e2e",)),
    "steps": (
        ".envs/torch",
        (
            "tests/steps",
            "tests/techniques",
            "tests/orchestrate/test_local.py",
            "tests/onnx/quantize",
            "tests/measure",
            "tests/measure/metrics",
        ),
    ),
    "stages": (".envs/serve", ("tests/kserve", "tests/release", "tests/store/test_registry.py", *STAGES)),
    "core": (
        ".venv",
        (
            "tests",
            "tests/store",  # before what points MLflow's client, which is one for the process, at a platform's server
            "tests/containers/test_dockerfiles.py",
            "tests/contract",
            "tests/data",
            "tests/helm",
            "tests/plan",
            "tests/platform",
            "tests/storage",
            "tests/orchestrate/watch",
            "tests/tools",
            "tests/tools/bench",
            "tests/tools/init",
        ),
    ),
    "serve": (".envs/serve", ("tests/serving", "tests/traffic", "tests/reports")),
    "torch": (
        ".envs/torch",
        (
            "tests/extension",
            "tests/frameworks",
            "tests/onnx",
            "tests/engines",
            "tests/tools/init/test_written.py",
            "tests/examples",
            "tests/data/test_tokens.py",
        ),
    ),
    "tensorflow": (
        ".envs/tensorflow",
        (
            "tests/frameworks/test_keras.py",
            "tests/frameworks/test_keras_3.py",
            "tests/techniques/test_cluster.py",
            "tests/engines/test_litert.py",
        ),
    ),
    "airflow": (".envs/airflow", ("tests/dags", "tests/orchestrate/triggers")),
    "kubeflow": (".envs/kubeflow", ("tests/orchestrate/kubeflow",)),
    "images": (".venv", ("tests/containers/test_images.py",)),
    "docker": (".envs/airflow", ("tests/dags/test_docker.py",)),
    "kfp": (".envs/kubeflow", ("tests/orchestrate/kubeflow/test_local_runner.py",)),
    "k8s": (".envs/airflow", ("tests/dags/test_cluster.py",)),
}
"""Part → its environment and its test files; a folder stands for the test files right in it. A file that one part
names is left out of another part's folder. What measures comes first, then the longest."""
MEASURES = ("e2e",)
"""Parts that measure, and so go before the others on a processor that they share."""
SLOW = "slow"
NO_TESTS = 5
"""Exit code of pytest when it found nothing to run."""
GIVES_WAY = 10
"""What the others add to their niceness. The scheduler then leaves them a tenth of a contested core."""
AT_A_TIME = {False: 3, True: 2}
"""Parallel parts, and those of the slow tests, which wait less, and some of which measure."""
NAMED = ("images", "docker", "kfp", "k8s")
"""Tiers that run only when they are named: they need minutes, and more than a checkout and its environments."""


def files_of(part: str) -> list[Path]:
    """Test files of a part."""
    named = {ROOT / p for _, paths in TABLE.values() for p in paths if p.endswith(".py")}
    found: list[Path] = []
    for path in TABLE[part][1]:
        if path.endswith(".py"):
            found += [ROOT / path] if (ROOT / path).exists() else []
        else:
            found += sorted(set((ROOT / path).glob("test_*.py")) - named)
    return found


def forgotten() -> set[Path]:
    """Test files that no part runs."""
    return set((ROOT / "tests").rglob("test_*.py")) - {file for part in TABLE for file in files_of(part)}


def run(part: str, report: Path, marked: str) -> bool:
    """Run a part's tests that are marked so and print what it said; whether it passed. Its figures go to `report`."""
    files = files_of(part)
    environment = TABLE[part][0]
    print(f"── {part}: {len(files)} files in {environment}", flush=True)
    began = time.monotonic()
    python = ROOT / environment / "bin" / "python"
    command = [str(python), "-m", "pytest", "-q", "--durations=5", f"--junitxml={report}", "-m", marked]
    # Without bytecode every process that a test starts compiles Airflow, MLflow or torch again: 4 s of a core each.
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command += map(str, files)
    if part not in MEASURES:
        command = ["nice", "-n", str(GIVES_WAY), *command]
    done = subprocess.run(
        command, cwd=ROOT, env=settings, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(f"\n{done.stdout}── {part}: {time.monotonic() - began:.0f} s", flush=True)
    return done.returncode in ((0, NO_TESTS) if marked == SLOW else (0,))


def run_all(reports: dict[str, Path], marked: str) -> list[str]:
    """Run the parts in their order; the failed ones."""
    with ThreadPoolExecutor(AT_A_TIME[marked == SLOW]) as pool:
        passed = dict(zip(reports, pool.map(lambda part: run(part, reports[part], marked), reports), strict=True))
    return [part for part, fine in passed.items() if not fine]


def count(reports: list[Path]) -> dict[str, int]:
    """Sum up pytest's own reports."""
    total = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for report in reports:
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):  # noqa: S314 (written by pytest just now)
            for key in total:
                total[key] += int(suite.get(key, 0))
    return total


def failures(reports: list[Path]) -> list[str]:
    """Return names of the failed tests, each as `path::test`, for readers of only the end of a long output."""
    names = []
    for report in reports:
        for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314 (written by pytest just now)
            if case.find("failure") is not None or case.find("error") is not None:
                names.append(f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}")
    return names


def main() -> None:
    """Run the named parts, or all but those that must be named."""
    slow = SLOW in sys.argv[1:]
    parts = [p for p in sys.argv[1:] if p != SLOW] or [p for p in TABLE if p not in NAMED]
    unknown = [p for p in parts if p not in TABLE]
    if unknown:
        sys.exit(f"no part {', '.join(unknown)}; known: {', '.join(TABLE)}")
    if left := forgotten():
        sys.exit(f"{', '.join(str(p.relative_to(ROOT)) for p in sorted(left))}: add to TABLE in scripts/test.py")
    with tempfile.TemporaryDirectory() as folder:
        reports = {part: Path(folder) / f"{part}.xml" for part in parts if files_of(part)}
        failed = run_all(reports, SLOW if slow else f"not {SLOW}")
        written = [r for r in reports.values() if r.exists()]
        total, names = count(written), failures(written)
    bad = total["failures"] + total["errors"]
    if failed:
        print("\n".join([f"\nfailed in: {', '.join(failed)}", *(f"  {name}" for name in names)]))
    print(f"\n{total['tests'] - bad - total['skipped']} passed, {bad} failed, {total['skipped']} skipped")
    sys.exit(1 if failed or not total["tests"] else 0)


if __name__ == "__main__":
    main()
