"""TensorRT 10 and 11, and TensorRT for RTX: the candidate's ONNX becomes a plan for NVIDIA GPUs.

Its other modules: `tensorrt_api` (which TensorRT this is), `_options`, `_onnx` (precision and quantization in the
model's types), `_build`, `_layers` (what was fused), `_run`. TensorRT for RTX also builds for GPUs in other machines,
with `options.compute_capability`; such an engine can be built anywhere, but is loaded only where its GPU is.
"""

import platform
from collections.abc import Mapping
from pathlib import Path

from slipstream.contract import digest
from slipstream.engines import tensorrt_layers
from slipstream.engines.base import EngineManifest, Runner
from slipstream.engines.compatibility import Relation
from slipstream.engines.tensorrt_api import DISTRIBUTIONS, FLAVOUR, MAJOR, NAME, RTX, VERSION, trt
from slipstream.engines.tensorrt_build import build_plan
from slipstream.engines.tensorrt_options import TensorRTOptions, options_of, ordinal_of, ranked
from slipstream.errors import EngineError
from slipstream.frameworks.base import read_manifest
from slipstream.home import Home
from slipstream.measure import gpu
from slipstream.spec import Target

PLAN = "model.plan"
AMPERE = (8, 0)
"""First compute capability with BF16, TF32 and sparse kernels."""


class TensorRT:
    """The engine `tensorrt`."""

    distributions = (*DISTRIBUTIONS, "cuda-bindings", "onnx", "onnxruntime")

    def check(self, target: Target) -> None:
        """Raise EngineError if an engine for the target cannot be built here."""
        ordinal, options = ordinal_of(target), options_of(target)
        _require_flavour(options)
        for capability in options.capabilities:
            if RTX and f"SM{capability.replace('.', '')}" not in trt.ComputeCapability.__members__:
                raise EngineError(f"tensorrt: {NAME} {VERSION} does not build for {capability}; it has {_buildable()}")
        capabilities = options.capabilities or (_gpu_to_build_on(ordinal).compute_capability,)
        if old := [c for c in capabilities if ranked(c) < AMPERE]:
            features = {"`precision: bf16`": target.precision == "bf16", "options.sparse": options.sparse}
            if problems := [name for name, requested in features.items() if requested]:
                raise EngineError(
                    f"tensorrt: {' and '.join(problems)} need compute capability 8.0 or more, and {old[0]} is less; "
                    "leave that out, or choose another GPU"
                )

    def check_load(self, target: Target) -> None:
        """Raise EngineError if an engine that can be built here cannot be loaded here."""
        options = options_of(target)
        try:
            here = gpu.find(ordinal_of(target))
        except EngineError as error:
            built = ", ".join(options.capabilities) or "an NVIDIA GPU"
            raise EngineError(
                f"tensorrt: built for compute capability {built}, and not to be loaded here: {error}"
            ) from error
        if options.capabilities and here.compute_capability not in options.capabilities:
            raise EngineError(
                f"tensorrt: built for compute capability {', '.join(options.capabilities)}, but this {here.name} has "
                f"{here.compute_capability}; add that to options.compute_capability and build again"
            )
        if options.hardware_compatibility == "ampere_plus" and ranked(here.compute_capability) < AMPERE:
            raise EngineError(f"tensorrt: built for compute capability 8.0 or more; this {here.name} has less")

    def gpu(self, target: Target) -> int:
        """Return CUDA's number of the target's device."""
        return ordinal_of(target)

    def fingerprint(self, target: Target) -> dict[str, str]:
        """Return version and flavor, precision, and the facts of the GPU and its driver that bind the engine."""
        options = options_of(target)
        facts = {
            "tensorrt": str(MAJOR) if options.version_compatible else VERSION,
            "flavour": FLAVOUR,
            "device": target.device,
            "precision": target.precision,
            "system": f"{platform.system()} {platform.machine()}",
        }
        if options.capabilities:  # kernels are compiled on loading: `check_load` compares the GPU
            return {**facts, "compute_capability": ", ".join(options.capabilities)}
        here = gpu.find(ordinal_of(target))
        if options.hardware_compatibility == "ampere_plus":
            return {**facts, "compute_capability": "8.0 or more"}
        facts["compute_capability"] = here.compute_capability
        if options.hardware_compatibility == "none":
            facts |= {"device_name": here.name, "driver": here.driver}
        return facts

    def relations(self, manifest: EngineManifest) -> Mapping[str, Relation]:
        """Return the relations: all facts must be equal; the options for compatibility omit facts from the
        fingerprint."""
        return {}

    def cache_file(self, target: Target) -> Path | None:
        """Return the file of timings (TensorRT) or compiled kernels (TensorRT for RTX) for this GPU; None if there are
        none.

        Its name is derived from the fingerprint without the precision: all models share the cache.
        """
        if not options_of(target).timing_cache:
            return None
        try:
            here = gpu.find(ordinal_of(target))
        except EngineError:
            return None
        key = digest([FLAVOUR, VERSION, here.name, here.compute_capability, here.driver, platform.machine()])[:16]
        return Home.from_environment().cache / "tensorrt" / f"{key}.{'runtime' if RTX else 'timing'}-cache"

    def build(self, candidate: Path, target: Target, folder: Path) -> dict[str, float]:
        """Write the plan, and the table of its layers. Figures: `layers`, and how many compute in each precision."""
        options = options_of(target)
        cache = None if RTX else self.cache_file(target)  # RTX times nothing when it builds
        plan, messages, figures = build_plan(candidate, read_manifest(candidate), target, options, cache)
        (folder / PLAN).write_bytes(plan)
        layers = tensorrt_layers.write(folder, plan, messages, loadable=self._loadable(target))
        return {**figures, **tensorrt_layers.figures(layers)}

    def load(self, folder: Path, target: Target) -> Runner:
        """Deserialize the plan on its GPU."""
        from slipstream.engines.tensorrt_run import TensorRTRunner

        plan, options = (folder / PLAN).read_bytes(), options_of(target)
        return TensorRTRunner(plan, target, options, ordinal_of(target), self.cache_file(target) if RTX else None)

    def _loadable(self, target: Target) -> bool:
        try:
            self.check_load(target)
        except EngineError:
            return False
        return True


def _require_flavour(options: TensorRTOptions) -> None:
    """Raise EngineError for options that this TensorRT lacks."""
    if not RTX and options.capabilities:
        raise EngineError(
            "tensorrt: options.compute_capability: TensorRT builds for the GPU that it sees; build where that GPU is, "
            "with hardware_compatibility, or with TensorRT for RTX (docs/engines.md)"
        )
    if RTX and options.hardware_compatibility != "none":
        raise EngineError(
            "tensorrt: options.hardware_compatibility: TensorRT for RTX does not have it; list the GPUs' compute "
            'capabilities instead, such as compute_capability: "8.6, 8.9, 12.0"'
        )
    if RTX and options.version_compatible:
        raise EngineError(
            "tensorrt: options.version_compatible: TensorRT for RTX comes without the lean runtime that this needs; "
            "leave it out and build again with each version"
        )


def _gpu_to_build_on(ordinal: int) -> gpu.Gpu:
    try:
        return gpu.find(ordinal)
    except EngineError as error:
        ahead = (
            "or set options.compute_capability, such as 8.6, to build ahead of time for a GPU that is elsewhere"
            if RTX
            else "or install TensorRT for RTX, which builds ahead of time for a GPU that is elsewhere"
        )
        raise EngineError(f"tensorrt: {error}; run where the GPU is, {ahead}") from error


def _buildable() -> str:
    names = [n.removeprefix("SM") for n in trt.ComputeCapability.__members__ if n.startswith("SM")]
    return ", ".join(f"{n[:-1]}.{n[-1]}" for n in names)


ENGINE = TensorRT()
