"""What imports what. The core loads no framework, so that `--help` and DAG parsing stay quick (ruff's TID253 is the
other half), and the rooms of the package import each other in no circle."""

import ast
import subprocess
import sys
import time
import tomllib
import warnings
from collections.abc import Iterator
from graphlib import TopologicalSorter
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
    """Best of five, since neighbours only ever slow it down; a miss is reported, and fails only when it is gross."""
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
    import ast

    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


KNOTS = {"engines": "models", "frameworks": "models", "measure": "models", "onnx": "models"} | {
    "platform": "machine",
    "traffic": "machine",
}
"""Rooms that still import each other: each group counts as one."""


def rooms_imported_by(path: Path) -> Iterator[str]:
    """Rooms that a module imports, also within functions; not what only the type checker reads."""
    tree = ast.parse(path.read_text())
    only_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in only_types or node.module is None:
            continue
        parts = node.module.split(".")
        if parts[0] == "slipstream":
            yield from (parts[1:2] if len(parts) > 1 else [alias.name for alias in node.names])


def test_rooms_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        imported = {KNOTS.get(other, other) for other in rooms_imported_by(path)}
        graph.setdefault(KNOTS.get(room, room), set()).update(imported - {KNOTS.get(room, room)})
    assert len(graph) > 20
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
