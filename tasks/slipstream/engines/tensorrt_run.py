"""Runs a TensorRT engine: pinned buffers, asynchronous copies, and CUDA graphs for the usual shapes.

Written against the modules of `tensorrt` 11.4, TensorRT for RTX 1.7.1 and cuda-bindings 13; not yet run on a GPU
(docs/engines.md lists what was tested).
"""

import contextlib
import ctypes
import itertools
import logging
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cuda.bindings import runtime as cuda

from slipstream.contract.arrays import Array, Float32Array
from slipstream.engines.base import require_batch
from slipstream.engines.tensorrt_api import MESSAGES, RTX, trt
from slipstream.engines.tensorrt_options import TensorRTOptions
from slipstream.errors import DataError, EngineError
from slipstream.frameworks.base import INPUT, OUTPUT
from slipstream.home import write_atomically
from slipstream.measure.gpu import ask
from slipstream.spec import Target

log = logging.getLogger(__name__)

Shape = tuple[int, ...]


def chunks(n: int, least: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Yield how an engine that takes batches of `least` to `most` runs n samples: (start, samples, batch size).

    The batch size exceeds the number of samples if the rest of a batch is too small for the engine.
    """
    for start in range(0, n, most):
        samples = min(most, n - start)
        yield start, samples, max(samples, least)


def usual_shapes(target: Target, shape: Shape) -> list[Shape]:
    """Return shapes (N, …) that are worth a CUDA graph: each batch size that the target names, at each of its
    lengths."""
    lengths = target.lengths or (1,)
    shapes = [
        (batch, *(length if size < 1 else size for size in shape))
        for batch, length in itertools.product(sorted(set(target.batch)), lengths)
    ]
    return list(dict.fromkeys(shapes))


class TensorRTRunner:
    """A loaded engine. One runner serves one thread at a time."""

    def __init__(self, plan: bytes, target: Target, options: TensorRTOptions, ordinal: int, cache: Path | None) -> None:
        self._ordinal, self._cache, self._options = ordinal, cache, options
        self._resources = contextlib.ExitStack()
        self._finalizer = weakref.finalize(self, self._resources.close)
        ask(cuda.cudaSetDevice(ordinal), f"GPU {ordinal}")
        self._engine = _deserialize(plan)
        self._dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(INPUT)))
        self._shape = tuple(int(d) for d in self._engine.get_tensor_shape(INPUT))[1:]
        self._least, self._most = self._profile()
        self._stream = ask(cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking), "a CUDA stream")
        self._resources.callback(cuda.cudaStreamDestroy, self._stream)
        self._runtime_cache: trt.IRuntimeCache | None = None
        self._context = self._new_context()
        self._buffers = self._allocate()
        self._graphs: dict[Shape, _Graph | None] = {}
        self._graphed = set(usual_shapes(target, self._shape)) if options.cuda_graph else set()

    def run(self, batch: Array) -> Array:
        """Return (N, …) float32 outputs for inputs (N, …). Raise DataError for a shape outside the engine's profile."""
        require_batch(batch, _like(self._shape, batch.shape[1:]), self._dtype)
        least, most, shape = self._least[1:], self._most[1:], batch.shape[1:]
        if any(not low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            raise DataError(f"the engine takes samples of {least} to {most}, not {shape}")
        ask(cuda.cudaSetDevice(self._ordinal), f"GPU {self._ordinal}")  # which is a setting of each thread
        parts = [
            self._run_one(batch[start : start + samples], size)
            for start, samples, size in chunks(len(batch), self._least[0], self._most[0])
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run_one(self, part: Array, size: int) -> Float32Array:
        shape = (size, *part.shape[1:])
        inputs = self._buffers.host_input(shape)
        np.copyto(inputs[: len(part)], part)
        inputs[len(part) :] = 0  # a batch that is too small is padded
        graph = self._graph(shape)
        if graph is None:
            answer = self._enqueue(self._context, shape)
        else:
            answer = graph.answer
            ask(cuda.cudaGraphLaunch(graph.executable, self._stream), "launching a CUDA graph")
        ask(cuda.cudaStreamSynchronize(self._stream), "running the engine")
        # A copy: the next answer is written into the same memory.
        return np.array(self._buffers.host_output(answer)[: len(part)], dtype=np.float32)

    def _enqueue(self, context: trt.IExecutionContext, shape: Shape) -> Shape:
        """Enqueue copy in, network, copy out on the stream; return the shape of the answer."""
        if not context.set_input_shape(INPUT, shape):
            raise DataError(f"the engine does not take a batch of shape {shape}")
        answer = tuple(int(d) for d in context.get_tensor_shape(OUTPUT))
        buffers, stream = self._buffers, self._stream
        context.set_tensor_address(INPUT, buffers.device_in)
        context.set_tensor_address(OUTPUT, buffers.device_out)
        to, back = cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        size = buffers.host_input(shape).nbytes
        ask(cuda.cudaMemcpyAsync(buffers.device_in, buffers.pinned_in, size, to, stream), "copying to the GPU")
        if not context.execute_async_v3(int(stream)):
            raise EngineError(f"tensorrt: the engine does not run a batch of shape {shape}")
        size = buffers.host_output(answer).nbytes
        ask(cuda.cudaMemcpyAsync(buffers.pinned_out, buffers.device_out, size, back, stream), "copying from the GPU")
        return answer

    def _graph(self, shape: Shape) -> "_Graph | None":
        """Return the CUDA graph of a usual shape, captured at first use; None if there is none."""
        if shape not in self._graphed:
            return None
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(shape)
        return self._graphs[shape]

    def _capture(self, shape: Shape) -> "_Graph | None":
        # A separate context: a graph must not outlive a change of the context that it was captured from.
        context = self._new_context()
        answer = self._enqueue(context, shape)  # the first run allocates and compiles, which a capture cannot
        ask(cuda.cudaStreamSynchronize(self._stream), "running the engine")
        self._keep_compiled()
        if RTX and not context.is_stream_capturable(int(self._stream)):
            log.info("tensorrt: shape %s runs without a CUDA graph: its kernels cannot be captured", shape)
            return None
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        ask(cuda.cudaStreamBeginCapture(self._stream, mode), "capturing a CUDA graph")
        try:
            self._enqueue(context, shape)
        finally:
            error, graph = cuda.cudaStreamEndCapture(self._stream)
        if int(error) != 0:
            log.info("tensorrt: shape %s runs without a CUDA graph: %s", shape, error)
            return None
        self._resources.callback(cuda.cudaGraphDestroy, graph)
        executable = ask(cuda.cudaGraphInstantiate(graph, 0), "instantiating a CUDA graph")
        self._resources.callback(cuda.cudaGraphExecDestroy, executable)
        return _Graph(executable, context, answer)

    def _profile(self) -> tuple[Shape, Shape]:
        """Return the smallest and largest shape of the input."""
        shape = tuple(int(d) for d in self._engine.get_tensor_shape(INPUT))
        if -1 not in shape:
            return shape, shape
        least, _, most = self._engine.get_tensor_profile_shape(INPUT, 0)
        return tuple(map(int, least)), tuple(map(int, most))

    def _new_context(self) -> trt.IExecutionContext:
        """Return an execution context. TensorRT for RTX compiles its kernels for the GPU now, or finds them in the
        cache."""
        if not RTX:
            return _made(self._engine.create_execution_context())
        config = self._engine.create_runtime_config()
        # Kernels for this exact shape, before the first answer: a graph would keep the general ones forever.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._cache is not None:
            if self._runtime_cache is None:
                self._runtime_cache = config.create_runtime_cache()
                if self._cache.exists() and not self._runtime_cache.deserialize(self._cache.read_bytes()):
                    log.warning("tensorrt: %s is not for this TensorRT, GPU and driver; compiling again", self._cache)
            config.set_runtime_cache(self._runtime_cache)
        return _made(self._engine.create_execution_context(runtime_config=config))

    def _keep_compiled(self) -> None:
        """Write the runtime cache of TensorRT for RTX back, if it has grown."""
        if self._runtime_cache is None or self._cache is None:
            return
        grown = bytes(self._runtime_cache.serialize())
        if not self._cache.exists() or self._cache.read_bytes() != grown:
            write_atomically(self._cache, grown)

    def _allocate(self) -> "_Buffers":
        """Allocate buffers for the largest shape that the engine takes."""
        if not self._context.set_input_shape(INPUT, self._most):
            raise EngineError(f"tensorrt: the engine does not take its own greatest shape {self._most}")
        answer = tuple(int(d) for d in self._context.get_tensor_shape(OUTPUT))
        out = np.dtype(trt.nptype(self._engine.get_tensor_dtype(OUTPUT)))
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in ((self._most, self._dtype), (answer, out))]
        pinned, device = [], []
        for size in sizes:
            pinned.append(int(ask(cuda.cudaHostAlloc(size, cuda.cudaHostAllocDefault), "pinned memory")))
            self._resources.callback(cuda.cudaFreeHost, pinned[-1])
            device.append(int(ask(cuda.cudaMalloc(size), "GPU memory")))
            self._resources.callback(cuda.cudaFree, device[-1])
        return _Buffers(pinned[0], pinned[1], device[0], device[1], self._dtype, out)


@dataclass(frozen=True)
class _Graph:
    """A captured run of one shape."""

    executable: cuda.cudaGraphExec_t
    context: trt.IExecutionContext
    """Kept alive: the graph's kernels use its memory."""
    answer: Shape


@dataclass(frozen=True)
class _Buffers:
    """Addresses of page-locked host memory and of GPU memory, for input and output."""

    pinned_in: int
    pinned_out: int
    device_in: int
    device_out: int
    dtype: np.dtype[np.generic]
    out: np.dtype[np.generic]

    def host_input(self, shape: Shape) -> Array:
        """Return the pinned input buffer's start, as an array."""
        return _view(self.pinned_in, shape, self.dtype)

    def host_output(self, shape: Shape) -> Array:
        """Return the pinned output buffer's start, as an array."""
        return _view(self.pinned_out, shape, self.out)


def _view(address: int, shape: Shape, dtype: np.dtype[np.generic]) -> Array:
    size = math.prod(shape) * dtype.itemsize
    memory = (ctypes.c_uint8 * size).from_address(address)
    return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)


def _like(shape: Shape, actual: Shape) -> Shape:
    """Return the engine's shape of a sample, with variable dimensions taken from the actual one."""
    if len(shape) != len(actual):
        return shape
    return tuple(size if size > 0 else there for size, there in zip(shape, actual, strict=True))


def _deserialize(plan: bytes) -> trt.ICudaEngine:
    with MESSAGES.kept() as messages:
        engine = trt.Runtime(MESSAGES).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(f"tensorrt: the engine cannot be loaded: {messages.errors()}")
    return engine


def _made(context: trt.IExecutionContext | None) -> trt.IExecutionContext:
    if context is None:
        raise EngineError("tensorrt: no execution context: the GPU's memory does not suffice, or its driver is too old")
    return context
