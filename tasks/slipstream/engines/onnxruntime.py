"""ONNX Runtime: the candidate's ONNX, optimised offline with every optimisation that this CPU allows."""

import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from slipstream import digests, hardware
from slipstream.engines.base import Options, Runner, read_options, require_batch
from slipstream.errors import EngineError
from slipstream.frameworks.base import INPUT, ONNX, OUTPUT
from slipstream.spec import Target

OPTIMISED = "model.onnx"
PROVIDERS = {"CPU": "CPUExecutionProvider"}
"""Device in a spec → execution provider. Another device also needs its facts in the fingerprint."""
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(uint8)": "uint8"}
"""ONNX Runtime's name of an input's type → NumPy's, for each of data.INPUT_DTYPES."""
ERRORS_ONLY = 3
X86 = ("x86_64", "AMD64")
"""Machines whose fast integer kernels take uint8 activations."""


class OnnxRuntimeOptions(Options):
    """What a target may say under `options`: nothing yet."""


class OnnxRuntimeRunner:
    """A session. ONNX Runtime plans its memory for each batch size, and each length, by itself."""

    def __init__(self, session: ort.InferenceSession) -> None:
        """Raises EngineError for a model whose input is of a type that data cannot have."""
        self._session = session
        port = session.get_inputs()[0]
        self._shape = tuple(d if isinstance(d, int) else -1 for d in port.shape[1:])
        if port.type not in DTYPES:
            raise EngineError(
                f"onnxruntime: the model's input is {port.type}; export it with one of {', '.join(DTYPES.values())}"
            )
        self._dtype = np.dtype(DTYPES[port.type])

    def run(self, batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """(N, …) inputs to (N, …) float32 outputs."""
        require_batch(batch, self._shape, self._dtype)
        return np.asarray(self._session.run([OUTPUT], {INPUT: batch})[0], dtype=np.float32)


class OnnxRuntime:
    """The engine `onnxruntime`."""

    distributions = ("onnxruntime",)

    def check(self, target: Target) -> None:
        """Raise EngineError for a device without a provider here, a precision other than f32, or any option."""
        read_options(target, OnnxRuntimeOptions)
        here = [d for d, provider in PROVIDERS.items() if provider in ort.get_available_providers()]
        if target.device not in here:
            raise EngineError(
                f"onnxruntime: no device {target.device!r} in this environment; it has {', '.join(here)}. "
                "Change the target's `device`"
            )
        if target.precision != "f32":
            raise EngineError(
                f"onnxruntime: its CPU kernels do not compute in {target.precision}; set the target's `precision` to "
                "f32, or its `engine` to openvino"
            )

    def fingerprint(self, target: Target) -> dict[str, str]:
        """Version, device, and the instruction sets that the optimised graph was laid out for."""
        return {
            "onnxruntime": digests.versions("onnxruntime")["onnxruntime"],
            "device": target.device,
            "cpu_features": hardware.describe()["cpu_features"],
            "precision": target.precision,
        }

    def build(self, candidate: Path, target: Target, folder: Path) -> None:
        """Optimise the graph and save it: folding, fusion, and the blocked layout that fits this CPU."""
        options = _options(target)
        options.optimized_model_filepath = str(folder / OPTIMISED)
        with tempfile.TemporaryDirectory() as aside:
            _session(_prepared(candidate / ONNX, Path(aside)), target, options)

    def load(self, folder: Path, target: Target) -> Runner:
        """Open a session on the optimised graph."""
        return OnnxRuntimeRunner(_session(folder / OPTIMISED, target, _options(target)))


def _prepared(path: Path, aside: Path) -> Path:
    """The candidate's ONNX, or a copy in the folder `aside` that is quantized as onnxruntime_graph.py says."""
    import onnx  # here, since what only serves an engine has no such package

    from slipstream.engines import onnxruntime_graph

    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf and the file system share no root but Exception
        raise EngineError(f"onnxruntime: cannot load {path}: {error}") from error
    changed = onnxruntime_graph.rows_first(model)
    if platform.machine() in X86:
        changed += onnxruntime_graph.unsigned(model)
    if not changed:
        return path
    onnx.save(model, aside / OPTIMISED)
    return aside / OPTIMISED


def _session(path: Path, target: Target, options: ort.SessionOptions) -> ort.InferenceSession:
    # ONNX Runtime has no root exception: its status codes are classes that derive from Exception alone.
    try:
        return ort.InferenceSession(path, options, providers=[PROVIDERS[target.device]])
    except Exception as error:
        raise EngineError(f"onnxruntime: cannot load {path}: {error}") from error


def _options(target: Target) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    # ALL, not EXTENDED: the blocked layout halves FP32 latency (0.51 ms against 1.03 ms, ResNet-14, two AVX2 cores)
    # and binds the graph to this CPU, which the fingerprint records.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = ERRORS_ONLY
    # Threads spin while they wait within an inference, which is fast, but not between two, which would take cores
    # away from the model server and from the other release.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


ENGINE = OnnxRuntime()
