"""What imports what. The core loads no framework, so that `--help` and DAG parsing stay quick. Ruff's TID253 and the
contracts of import-linter (pyproject.toml) are the other half; both run in `make lint`."""

import ast
import subprocess
import sys
import time
import tomllib
import warnings
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tasks" / "slipstream"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
BANNED = set(SETTINGS["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-module-level-imports"])
ALSO_SLOW = {"airflow", "boto3", "mlflow", "numpy", "pandas", "scipy"}
HELP_S = 0.5
"""What `slipstream --help` may take on a quiet machine."""


def modules_after(code: str) -> set[str]:
    """Top-level modules that are loaded after `code` ran in a fresh interpreter."""
    program = f"import sys\n{code}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_loads_neither_a_framework_nor_anything_slow() -> None:
    code = "sys.argv = ['slipstream', '--help']\nfrom slipstream.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert modules_after(code) & (BANNED | ALSO_SLOW) == set()


def test_the_modules_that_dags_use_load_no_framework() -> None:
    code = "import slipstream.contract.handover, slipstream.plan.catalog, slipstream.plan.flow, slipstream.spec"
    assert modules_after(code) & (BANNED | ALSO_SLOW) == set()


def test_the_report_loads_no_framework_until_it_draws() -> None:
    code = "from slipstream.reports import find, page, show, tables"
    assert modules_after(code) & (BANNED | {"airflow", "pandas", "scipy"}) == set()


def test_help_is_quick() -> None:
    """Best of five, since other load only slows it down; a miss is reported, and fails only when it is gross."""
    command = [str(Path(sys.executable).parent / "slipstream"), "--help"]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    best = min(times)
    if best > HELP_S:
        warnings.warn(f"slipstream --help took {best:.2f} s; {HELP_S} s is the goal", stacklevel=1)
    assert best < 6 * HELP_S


def test_steps_never_import_airflow_and_dags_never_import_a_framework() -> None:
    for path in (ROOT / "tasks").rglob("*.py"):
        assert not imports(path) & {"airflow"}, path
    for path in (ROOT / "dags").rglob("*.py"):
        assert not imports(path) & (BANNED | {"mlflow", "numpy"}), path


def imports(path: Path) -> set[str]:
    """Top-level names of all modules that a file imports, also inside functions."""

    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found
