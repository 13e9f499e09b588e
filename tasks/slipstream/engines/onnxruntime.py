"""ONNX Runtime: the candidate's ONNX, optimized offline as far as no processor is bound; the rest on loading.

The stored graph is folded and fused, but has no layout that depends on the processor: a graph whose layout was chosen
for AVX-512 loads on AVX2 without an error, and gives random answers there (13 % instead of 100 % of a ResNet-14's
labels).
"""

import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from slipstream import digests, hardware
from slipstream.contract.arrays import Array
from slipstream.engines.base import EngineManifest, Options, Runner, read_options, require_batch
from slipstream.engines.compatibility import Relation
from slipstream.errors import EngineError
from slipstream.frameworks.base import INPUT, ONNX, OUTPUT
from slipstream.spec import Target

OPTIMISED = "model.onnx"
PROVIDERS = {"CPU": "CPUExecutionProvider"}
"""Execution providers by device in a spec. Another device also needs its facts in the fingerprint."""
DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32", "tensor(uint8)": "uint8"}
"""NumPy's names of input types by ONNX Runtime's, for each of data.INPUT_DTYPES."""
ERRORS_ONLY = 3
PORTABLE = "portable"
"""Form of the stored graph. Earlier forms bound the layout to the processor and have no such fact."""


class OnnxRuntimeOptions(Options):
    """What a target may set under `options`: nothing yet."""


class OnnxRuntimeRunner:
    """A session. ONNX Runtime plans its memory for each batch size and each length."""

    def __init__(self, session: ort.InferenceSession) -> None:
        """Raise EngineError for a model whose input type data cannot have."""
        self._session = session
        port = session.get_inputs()[0]
        self._shape = tuple(d if isinstance(d, int) else -1 for d in port.shape[1:])
        if port.type not in DTYPES:
            raise EngineError(
                f"onnxruntime: the model's input is {port.type}; export it with one of {', '.join(DTYPES.values())}"
            )
        self._dtype = np.dtype(DTYPES[port.type])

    def run(self, batch: Array) -> Array:
        """Return (N, …) float32 outputs for inputs (N, …)."""
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
        """Return version, device, processor, and the form of the stored graph."""
        return {
            "onnxruntime": digests.versions("onnxruntime")["onnxruntime"],
            "device": target.device,
            "graph": PORTABLE,
            "machine": platform.machine(),
            "cpu_features": hardware.describe()["cpu_features"],
            "precision": target.precision,
        }

    def relations(self, manifest: EngineManifest) -> Mapping[str, Relation]:
        """Return the relations: later versions of ONNX Runtime 1 read earlier files; layout is chosen on loading."""
        if manifest.fingerprint.get("graph") != PORTABLE:
            return {}
        return {"onnxruntime": Relation.SAME_MAJOR, "cpu_features": Relation.ANY}

    def build(self, candidate: Path, target: Target, folder: Path) -> None:
        """Optimize the graph and save it: folding and fusion, but no layout."""
        options = _options(target)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(folder / OPTIMISED)
        with tempfile.TemporaryDirectory() as aside:
            _session(_prepared(candidate / ONNX, Path(aside)), target, options)

    def load(self, folder: Path, target: Target) -> Runner:
        """Open a session on the optimized graph, laid out for this processor, with exact sums."""
        options = _options(target)
        if hardware.int8_sums() == "saturating":
            # Weights beyond 7 bits become uint8, whose kernels are exact. This happens on loading, since it would
            # change the stored graph, and only here, since ONNX Runtime would do it on VNNI too, where INT8 then takes
            # 1.8 times as long.
            options.add_session_config_entry("session.x64quantprecision", "1")
        return OnnxRuntimeRunner(_session(folder / OPTIMISED, target, options))


def _prepared(path: Path, aside: Path) -> Path:
    """Return the candidate's ONNX, or a copy in the folder `aside` that is quantized as onnxruntime_graph.py
    describes."""
    import onnx  # here, since environments that only serve engines lack this package

    from slipstream.engines import onnxruntime_graph

    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf and the file system share no root but Exception
        raise EngineError(f"onnxruntime: cannot load {path}: {error}") from error
    changed = onnxruntime_graph.gather_before_dequantize(model)
    if platform.machine() in hardware.X86:  # whose fast integer kernels take uint8 activations
        changed += onnxruntime_graph.activations_to_uint8(model)
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
    # ALL, not EXTENDED: the blocked layout halves FP32 latency (0.51 ms against 1.03 ms, ResNet-14, two AVX2 cores).
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = ERRORS_ONLY
    # Threads spin while they wait within an inference, which is fast, but not between two, which would take cores away
    # from the model server and from the other release.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


ENGINE = OnnxRuntime()
