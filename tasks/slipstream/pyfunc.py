"""Lets MLflow load what slipstream logged: `mlflow.pyfunc.load_model("models:/fashion-resnet@champion")`."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class _Runs(Protocol):
    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]: ...


class PyFunc:
    """Adapts a loaded candidate or engine to MLflow's `predict`."""

    def __init__(self, model: _Runs) -> None:
        self._model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> npt.NDArray[Any]:
        """Return (N, …) outputs for inputs (N, …)."""
        # MLflow passes the tensors by the names in the signature; there is one.
        batch = next(iter(model_input.values())) if isinstance(model_input, dict) else model_input
        return self._model.run(np.asarray(batch))


def _load_pyfunc(path: str) -> PyFunc:
    folder = Path(path)
    if folder.name == "engine":
        from slipstream.engines.base import load_engine

        return PyFunc(load_engine(folder))
    from slipstream.frameworks.base import load_eager

    return PyFunc(load_eager(folder))
