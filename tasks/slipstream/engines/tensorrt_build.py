"""Builds a TensorRT engine (a plan) from ONNX: network, optimization profile, the builder's settings, timing cache."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import onnx

from slipstream.engines import tensorrt_onnx
from slipstream.engines.tensorrt_api import MAJOR, MESSAGES, NAME, RTX, Said, trt
from slipstream.engines.tensorrt_options import TensorRTOptions
from slipstream.errors import EngineError
from slipstream.frameworks.base import INPUT, ONNX, CandidateManifest
from slipstream.home import write_atomically
from slipstream.spec import Target

log = logging.getLogger(__name__)

MIB = 2**20

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Smallest, usual and largest shape (N, …) of the input."""

    least: Shape
    usual: Shape
    most: Shape


def profile(shape: Shape, target: Target) -> Profile:
    """Return the optimization profile of an input whose samples have the shape `shape`, -1 where it varies.

    The batch comes from `target.batch`, the one other axis that may vary from `target.lengths`. Raise EngineError for
    an axis without a known size: TensorRT would report it only after the network has been read.
    """
    varying = [axis + 1 for axis, size in enumerate(shape) if size < 1]
    if varying and not target.lengths:
        raise EngineError(
            f"tensorrt: axis {varying[0]} of the input varies, but the target has no profile for it; list the lengths "
            "that it takes in the target's `lengths`, such as [16, 32, 64], or give the axis a fixed size in the model"
        )
    if len(varying) > 1:
        raise EngineError(
            f"tensorrt: axes {', '.join(map(str, varying))} of the input vary; a target's `lengths` are for one axis, "
            "so fix the others in the model"
        )
    lengths = target.lengths or (1,)
    chosen = (lengths[0], lengths[len(lengths) // 2], lengths[-1])
    least, usual, most = (
        (batch, *(length if size < 1 else size for size in shape))
        for batch, length in zip(target.batch, chosen, strict=True)
    )
    return Profile(least, usual, most)


def build_plan(
    candidate: Path, manifest: CandidateManifest, target: Target, options: TensorRTOptions, cache: Path | None
) -> tuple[bytes, Said, dict[str, float]]:
    """Return the engine's bytes, TensorRT's messages, and figures. `cache` is the timing cache's file, kept up to date.

    Raise EngineError that names the unsupported node.
    """
    shapes = profile(manifest.input_shape, target)
    model = tensorrt_onnx.read(candidate / ONNX)
    tensorrt_onnx.fix_input(model, INPUT, (-1, *manifest.input_shape))
    model = tensorrt_onnx.prepare(model, target.precision)
    figures = _sparsity(model, options)
    with MESSAGES.kept() as messages:
        builder = trt.Builder(MESSAGES)
        builder.max_threads = target.threads
        network = _network(builder, model, messages)
        config = _config(builder, target, options)
        _add_profile(builder, config, network, shapes)
        with _timing_cache(config, cache):
            built = builder.build_serialized_network(network, config)
        if built is None:
            raise EngineError(f"tensorrt: cannot build {candidate.name}: {messages.errors()}")
        return bytes(built), messages, figures


def _network(builder: trt.Builder, model: onnx.ModelProto, messages: Said) -> trt.INetworkDefinition:
    """Return the strongly typed network of a model. Raise EngineError."""
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if not RTX and MAJOR < 11 else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, MESSAGES)
    if not parser.parse(model.SerializeToString()):
        problems = [_problem(parser.get_error(i)) for i in range(parser.num_errors)]
        raise EngineError(f"tensorrt: cannot take the model: {'; '.join(problems) or messages.errors()}")
    return network


def _problem(error: trt.ParserError) -> str:
    where = f"node {error.node_name() or error.node()} ({error.node_operator()})"
    text = str(error.desc()).partition("\n")[0].removeprefix("Assertion failed: ")
    code = str(error.code()).rpartition(".")[2]
    if code.startswith("UNSUPPORTED") or "Plugin not found" in text:
        return f"{where}: {NAME} does not have this operator in this form"
    return f"{where}: {text}"


def _config(builder: trt.Builder, target: Target, options: TensorRTOptions) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the layers can be told apart
    flags = {
        trt.BuilderFlag.TF32: options.tf32,  # on unless it is turned off
        trt.BuilderFlag.SPARSE_WEIGHTS: options.sparse,
        trt.BuilderFlag.VERSION_COMPATIBLE: options.version_compatible,
        trt.BuilderFlag.DISABLE_TIMING_CACHE: not RTX and not options.timing_cache,
    }
    for flag, enabled in flags.items():
        if enabled:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * MIB)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if RTX:
        capabilities = [f"SM{c.replace('.', '')}" for c in options.capabilities] or ["CURRENT"]
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], index)
    elif options.hardware_compatibility != "none":
        level = trt.HardwareCompatibilityLevel.__members__[options.hardware_compatibility.upper()]
        config.hardware_compatibility_level = level
    return config


def _add_profile(
    builder: trt.Builder, config: trt.IBuilderConfig, network: trt.INetworkDefinition, shapes: Profile
) -> None:
    if -1 not in tuple(network.get_input(0).shape):
        return  # the model itself fixes its batch
    optimization_profile = builder.create_optimization_profile()
    optimization_profile.set_shape(INPUT, shapes.least, shapes.usual, shapes.most)
    if config.add_optimization_profile(optimization_profile) < 0:
        raise EngineError(f"tensorrt: the model does not take the shapes {shapes.least} to {shapes.most}")


@contextmanager
def _timing_cache(config: trt.IBuilderConfig, path: Path | None) -> Iterator[None]:
    """Use a timing cache and write back what the build added. A file that this TensorRT does not accept is replaced."""
    if path is None:
        yield
        return
    stored = path.read_bytes() if path.exists() else b""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        log.warning("tensorrt: the timing cache %s is not for this TensorRT and GPU; starting a new one", path)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    yield
    grown = bytes(cache.serialize())
    if grown != stored:
        write_atomically(path, grown)


def _sparsity(model: onnx.ModelProto, options: TensorRTOptions) -> dict[str, float]:
    """Return how many layers can use sparse kernels, if they are enabled."""
    if not options.sparse:
        return {}
    patterned, layers = tensorrt_onnx.sparse_layers(model)
    if not patterned:
        log.warning(
            "tensorrt: options.sparse has no effect: none of %d layers has weights with the pattern 2:4; prune in that "
            "pattern first",
            layers,
        )
    return {"sparse_layers": float(patterned)}
