"""slipstream: makes trained models fast and puts them into production safely.

The names in `__all__` are the public API. Every other name is internal and may change with any version, but for those
that docs/extending.md uses: packages that add an engine, a technique, a metric or a runtime build on them.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slipstream.contract import Section as Section
    from slipstream.contract.handover import RolledBack as RolledBack
    from slipstream.data.splits import Data as Data
    from slipstream.data.splits import Split as Split
    from slipstream.data.tokens import Tokenizer as Tokenizer
    from slipstream.errors import DataError as DataError
    from slipstream.errors import SlipstreamError as SlipstreamError
    from slipstream.frameworks.training import Training as Training
    from slipstream.home import Home as Home
    from slipstream.platform.health import ServiceStatus
    from slipstream.plugins import EngineInfo as EngineInfo
    from slipstream.plugins import MetricInfo as MetricInfo
    from slipstream.plugins import RuntimeInfo as RuntimeInfo
    from slipstream.plugins import TechniqueInfo as TechniqueInfo
    from slipstream.reports.document import Report as Report
    from slipstream.spec import Spec as Spec

_CLASSES = {
    "Data": "data.splits",
    "DataError": "errors",
    "EngineInfo": "plugins",
    "Home": "home",
    "MetricInfo": "plugins",
    "Report": "reports.document",
    "RolledBack": "contract.handover",
    "RuntimeInfo": "plugins",
    "Section": "contract",
    "SlipstreamError": "errors",
    "Spec": "spec",
    "Split": "data.splits",
    "TechniqueInfo": "plugins",
    "Tokenizer": "data.tokens",
    "Training": "frameworks.training",
}
"""Module of each public class, imported at first use: `import slipstream` loads nothing."""

__all__ = ["load", "optimize", "report", "rollback", "run", "status", *_CLASSES]  # noqa: PLE0604 (all are strings)


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_CLASSES[name]}"), name)


def load(spec: Path | str) -> "Spec":
    """Read and validate a spec: a path or an s3:// URI. Raise SpecError with a line for each problem."""
    from slipstream.spec import load as load_spec

    return load_spec(spec)


def run(spec: Path | str, **choices: Any) -> str:
    """Publish a spec file and start a run of it in Airflow; return the run's id.

    choices: fields of the trigger form: max_drop, recipes, stop_after, source_version. Raises SpecError, InputError,
    Unavailable.
    """
    from slipstream.home import Home
    from slipstream.orchestrate.watch import start

    return start.start(Home.from_environment(), Path(spec), choices).run_id


def optimize(spec: "Spec | Path | str") -> "Report":
    """Run stage 1 of a spec here, without Airflow, and return its report: every engine with its evidence.

    Nothing is deployed. The report draws itself in a terminal (rich) and in a notebook, and `report.table()` is a
    pandas DataFrame. Raise InputError when the check refuses the spec, Unavailable where MLflow is missing.
    """
    from slipstream.home import Home
    from slipstream.orchestrate import local
    from slipstream.spec import Spec, load

    return local.optimize(Home.from_environment(), spec if isinstance(spec, Spec) else load(spec))


def status() -> "list[ServiceStatus]":
    """Return the state of every service of the embedded platform. Raises Unavailable when it was never started."""
    from slipstream.home import Home
    from slipstream.platform import addresses, health

    home = Home.from_environment()
    return health.status(home, addresses.load(home))


def report(run: str) -> "Report":
    """Return the report of a run: its key, its MLflow run id, or the name of a spec for its latest run.

    Raises InputError when there is no such run, Unavailable while it has no report.
    """
    from slipstream.home import Home
    from slipstream.reports import find

    return find.load(find.pipeline_run(find.connect(Home.from_environment()), run))


def rollback(model: str, *, leave: str | None = None, reason: str = "") -> "RolledBack":
    """Restore the last good release of a registered model; return which versions its aliases name now.

    leave: version to replace; None is the champion, once: a repetition changes nothing. Raise RegistryError if there is
    nothing to return to, Unavailable.
    """
    from slipstream.home import Home
    from slipstream.steps.rollback import by_hand

    return by_hand(model, Home.from_environment(), leave=leave, reason=reason)
