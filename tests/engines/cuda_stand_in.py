"""A CUDA and a TensorRT of host memory, to test what the runner does, and in which order, without a GPU.

Memory is real, copies are real, and the network is the candidate's ONNX run by ONNX Runtime, but only when the stream
gets to it: like CUDA's, the stream does nothing before it is waited for, and while a graph is captured it remembers.
So a copy that is forgotten, a buffer that is read too early, or a graph of another shape gives wrong answers.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from slipstream.frameworks.base import INPUT, ONNX, OUTPUT

Work = Callable[[], None]


class Stream(int):
    """A handle."""


class Cuda:
    """What the runner uses of `cuda.bindings.runtime`: each function answers (error, value…)."""

    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0

    class cudaMemcpyKind:
        cudaMemcpyHostToDevice = 1
        cudaMemcpyDeviceToHost = 2

    class cudaStreamCaptureMode:
        cudaStreamCaptureModeThreadLocal = 1

    def __init__(self) -> None:
        self.queue: list[Work] = []
        self.captured: list[Work] | None = None
        self.memory: dict[int, Any] = {}
        self.launched = 0
        self.freed: list[str] = []

    def put(self, work: Work) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def cudaSetDevice(self, ordinal: int) -> tuple[int]:
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, Stream]:
        return 0, Stream(7)

    def cudaStreamDestroy(self, stream: Stream) -> tuple[int]:
        self.freed.append("stream")
        return (0,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[int, int]:
        block = (ctypes.c_byte * size)()
        ctypes.memset(block, 0xFF, size)  # NaN, so that what is not written shows
        self.memory[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaMalloc(self, size: int) -> tuple[int, int]:
        return self.cudaHostAlloc(size, 0)

    def cudaFreeHost(self, address: int) -> tuple[int]:
        self.freed.append("pinned")
        del self.memory[address]
        return (0,)

    def cudaFree(self, address: int) -> tuple[int]:
        self.freed.append("device")
        del self.memory[address]
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: Stream) -> tuple[int]:
        self.put(lambda: ctypes.memmove(to, source, size) and None)
        return (0,)

    def cudaStreamSynchronize(self, stream: Stream) -> tuple[int]:
        assert self.captured is None, "CUDA forbids waiting while a stream is captured"
        queue, self.queue = self.queue, []
        for work in queue:
            work()
        return (0,)

    def cudaStreamBeginCapture(self, stream: Stream, mode: int) -> tuple[int]:
        self.captured = []
        return (0,)

    def cudaStreamEndCapture(self, stream: Stream) -> tuple[int, list[Work]]:
        found, self.captured = self.captured or [], None
        return 0, found

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[int, list[Work]]:
        return 0, list(graph)

    def cudaGraphLaunch(self, executable: list[Work], stream: Stream) -> tuple[int]:
        self.launched += 1
        self.queue += executable
        return (0,)

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[int]:
        self.freed.append("graph")
        return (0,)

    def cudaGraphExecDestroy(self, executable: list[Work]) -> tuple[int]:
        self.freed.append("executable")
        return (0,)


class Engine:
    """An engine with one profile, whose kernels are ONNX Runtime's."""

    def __init__(
        self, cuda: Cuda, candidate: Path, least: int, most: int, trt: Any, *, capturable: bool = True
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(candidate / ONNX, options, providers=["CPUExecutionProvider"])
        self.cuda, self.trt, self.capturable = cuda, trt, capturable
        self.shapes = {p.name: tuple(p.shape[1:]) for p in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.least, self.most = least, most
        self.caches = 0

    def get_tensor_dtype(self, name: str) -> Any:
        return self.trt.float32

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *self.shapes[name])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [(n, *self.shapes[name]) for n in (self.least, self.least, self.most)]

    def create_runtime_config(self) -> "Config":
        return Config(self)

    def create_execution_context(self, *, runtime_config: "Config") -> "Context":
        return Context(self, runtime_config)


class Cache:
    """A runtime cache that remembers how many contexts were compiled with it."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        self.content = blob
        return True

    def serialize(self) -> bytes:
        return self.content


class Config:
    """A runtime configuration of TensorRT for RTX."""

    dynamic_shapes_kernel_specialization_strategy: Any = None

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.cache: Cache | None = None

    def create_runtime_cache(self) -> Cache:
        self.engine.caches += 1
        return Cache()

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


class Context:
    """An execution context."""

    def __init__(self, engine: Engine, config: Config) -> None:
        self.engine, self.config = engine, config
        self.batch = 0
        self.addresses: dict[str, int] = {}
        self.compiled = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if not self.engine.least <= shape[0] <= self.engine.most or tuple(shape[1:]) != self.engine.shapes[name]:
            return False
        self.batch = shape[0]
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.batch, *self.engine.shapes[name])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory in self.engine.cuda.memory
        self.addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self.engine.cuda.captured is None or self.compiled, "the first run compiles, which cannot be captured"
        if not self.compiled and self.config.cache is not None:
            self.config.cache.content += b"kernel;"
        self.compiled = True
        batch, addresses = self.batch, dict(self.addresses)

        def kernel() -> None:
            inputs = _array(addresses[INPUT], (batch, *self.engine.shapes[INPUT]))
            (answer,) = self.engine.session.run([OUTPUT], {INPUT: inputs.copy()})
            _array(addresses[OUTPUT], answer.shape)[...] = answer

        self.engine.cuda.put(kernel)
        return True


def _array(address: int, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * 4
    return np.ndarray(shape, np.float32, buffer=(ctypes.c_byte * size).from_address(address))
