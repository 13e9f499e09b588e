"""Caches that speed up an engine's next build or load (for example TensorRT's timing cache), shared through MLflow.

The file is in the cache of SLIPSTREAM_HOME, under a name that identifies the GPU, its driver and the engine's version.
A build fetches it from the latest run that had it, if it is missing here, and logs it as an artifact of its own run if
it has grown. Machines with the same GPU therefore share it through MLflow's artifact store.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from slipstream import digests
from slipstream.home import write_atomically
from slipstream.store.tracking import StepRun, Tracking

log = logging.getLogger(__name__)

TAG = "slipstream.store.engine_cache"
FOLDER = "engine-cache"


@contextmanager
def shared(tracking: Tracking, run: StepRun, path: Path | None) -> Iterator[None]:
    """Fetch the cache file before a build and share it afterwards. No effect for None."""
    if path is None:
        yield
        return
    restore(tracking, path)
    before = digests.file(path) if path.exists() else None
    yield
    if path.exists() and digests.file(path) != before:
        run.artifact(path, FOLDER)
        run.tags({TAG: path.name})  # last: the tag is visible only with the file


def restore(tracking: Tracking, path: Path) -> None:
    """Fetch the file that the latest build of this model logged under this name, unless one is here."""
    if path.exists():
        return
    for run in tracking.search_all({TAG: path.name}):
        try:
            local_path = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/{FOLDER}/{path.name}")
        except (MlflowException, OSError) as error:
            log.warning("%s of MLflow run %s cannot be fetched: %s", path.name, run.info.run_id, error)
            continue
        write_atomically(path, Path(local_path).read_bytes())
        log.info("%s comes from MLflow run %s", path.name, run.info.run_id)
        return
