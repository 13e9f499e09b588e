"""LiteRT: the candidate's SavedModel becomes one .tflite file, which phones, boards and servers run.

LiteRT does its own quantization, from the float SavedModel, according to `quantize` of the spec: `int8` with ranges
from the candidate's calibration samples (or the model's own, if it was trained with them), `int8-dynamic`, and weights
only. Inputs and outputs keep the framework's types. With precision f16, weights are stored in float16 and computed in
float32.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from slipstream import digests, hardware
from slipstream.contract.arrays import Array
from slipstream.engines.base import EngineManifest, Options, Runner, read_options, require_batch
from slipstream.engines.compatibility import Relation
from slipstream.engines.litert_file import SAVED_MODEL, arena_bytes, convert, open_interpreter
from slipstream.errors import EngineError
from slipstream.frameworks.base import read_manifest
from slipstream.spec import Target

MODEL = "model.tflite"
UNSUPPORTED = re.compile(r"^(?:Custom|TF Select|Flex) ops: (.+)$", re.MULTILINE)


class LiteRTOptions(Options):
    """Options of the engine `litert`."""

    xnnpack: bool = True
    """Whether XNNPACK computes what it supports, which is faster; otherwise LiteRT's built-in kernels do."""
    max_arena_kib: Annotated[int, Field(ge=1)] | None = None
    """Memory-limited profile: an engine whose tensor arena at batch 1 is larger, in KiB, is not built."""


class LiteRTRunner:
    """One interpreter, which plans its memory again when the shape of the batch changes (9 µs for a small network)."""

    def __init__(self, path: Path, target: Target) -> None:
        xnnpack = read_options(target, LiteRTOptions).xnnpack
        self._interpreter = open_interpreter(path.read_bytes(), xnnpack=xnnpack, threads=target.threads)
        port = self._interpreter.get_input_details()[0]
        self._input, self._output = port["index"], self._interpreter.get_output_details()[0]["index"]
        self._shape, self._dtype = tuple(map(int, port["shape_signature"][1:])), np.dtype(port["dtype"])
        self._planned: tuple[int, ...] = ()

    def run(self, batch: Array) -> Array:
        """Return (N, …) float32 outputs for inputs (N, …). Raise EngineError for a batch that the network does not
        accept."""
        require_batch(batch, self._shape, self._dtype)
        try:
            if batch.shape != self._planned:
                self._planned = ()
                self._interpreter.resize_tensor_input(self._input, batch.shape)
                self._interpreter.allocate_tensors()
                self._planned = batch.shape
            self._interpreter.set_tensor(self._input, batch)
            self._interpreter.invoke()
        except RuntimeError as error:
            raise EngineError(f"litert: the network does not take a batch of shape {batch.shape}: {error}") from error
        return np.asarray(self._interpreter.get_tensor(self._output), dtype=np.float32)  # get_tensor copies


class LiteRT:
    """The engine `litert`."""

    distributions = ("ai-edge-litert", "ai-edge-quantizer", "tensorflow")

    def check(self, target: Target) -> None:
        """Raise EngineError for an unsupported device or precision, and for options that do not fit."""
        if target.device != "CPU":
            raise EngineError(f"litert: no device {target.device!r} here; it has CPU. Change the target's `device`")
        if target.precision == "bf16":
            raise EngineError("litert: it has no bf16; set the target's `precision` to f32 or f16")
        options = read_options(target, LiteRTOptions)
        if options.max_arena_kib and options.xnnpack:
            raise EngineError(
                "litert: options.max_arena_kib limits the arena of the built-in kernels, but XNNPACK keeps memory of "
                "its own beside it; set `xnnpack: false` too"
            )

    def fingerprint(self, target: Target) -> dict[str, str]:
        """Return version and the instruction sets that kernels are chosen by. The file itself runs anywhere."""
        return {
            "litert": digests.versions("ai-edge-litert")["ai-edge-litert"],
            "device": target.device,
            "cpu_features": hardware.describe()["cpu_features"],
            "precision": target.precision,
        }

    def relations(self, manifest: EngineManifest) -> Mapping[str, Relation]:
        """Return the relations: the file is the same for all processors, and later versions read those of earlier
        ones."""
        return {"litert": Relation.SAME_MAJOR, "cpu_features": Relation.ANY}

    def build(self, candidate: Path, target: Target, folder: Path) -> dict[str, float]:
        """Convert, and measure the tensor arena. Raise EngineError, also for an arena above the target's limit."""
        if not (candidate / SAVED_MODEL).is_dir():
            raise EngineError(
                f"litert: {candidate.name} has no {SAVED_MODEL}/, which LiteRT is built from; models of framework "
                "keras have one. Choose another engine for this one"
            )
        manifest = read_manifest(candidate)
        if manifest.quantized and manifest.quantization is None:
            raise EngineError(f"litert: {candidate.name} does not say how it was quantized; quantize it again")
        try:
            model = convert(candidate, manifest.quantization, target)
            arena = arena_bytes(model, max(target.lengths, default=None))
        except Exception as error:  # the converter's, TensorFlow's and the quantizer's errors share no root
            raise EngineError(f"litert: cannot convert {candidate.name}/{SAVED_MODEL}: {_reason(error)}") from error
        _require_arena(arena, read_options(target, LiteRTOptions).max_arena_kib)
        (folder / MODEL).write_bytes(model)
        return {} if arena is None else {"arena_bytes": float(arena)}

    def load(self, folder: Path, target: Target) -> Runner:
        """Open an interpreter on the file."""
        return LiteRTRunner(folder / MODEL, target)


def _reason(error: Exception) -> str:
    """Return the useful part of the converter's pages of compiler output."""
    missing = UNSUPPORTED.findall(str(error))
    if missing:
        return f"LiteRT has no operator for {', '.join(missing)}; replace it in the network, or choose another engine"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _require_arena(arena: int | None, limit_kib: int | None) -> None:
    """Raise EngineError if the arena is larger than the limit, or cannot be measured."""
    if limit_kib is not None and (arena is None or arena > 1024 * limit_kib):
        needs = f"is {arena / 1024:.1f} KiB" if arena else "is unknown (control flow, or a length but no `lengths`)"
        raise EngineError(
            f"litert: the tensor arena at batch 1 {needs} but options.max_arena_kib allows {limit_kib}; make the model "
            "smaller (prune, quantize), or change the limit"
        )


ENGINE = LiteRT()
