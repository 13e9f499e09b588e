"""PyTorch itself as an engine: a comparison for the others. It is measured and never released.

It is built from a candidate's weights and the user's network, not from ONNX, so only from an unquantized candidate.
TorchScript files and AOTInductor packages are code (an archive with a pickle; a shared library): they are loaded only
from engine folders, after `load_engine` has compared each file with the digest recorded at the build.
"""

import os
import shutil
import subprocess
import sysconfig
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from slipstream import digests, hardware
from slipstream.contract.arrays import Array
from slipstream.engines.base import EngineManifest, Options, Runner, read_options, require_batch
from slipstream.engines.compatibility import Relation
from slipstream.errors import EngineError, ModelError
from slipstream.frameworks.base import MANIFEST, ONNX, CandidateManifest, read_manifest
from slipstream.frameworks.torch import FRAMEWORK
from slipstream.spec import Target

SCRIPT, PACKAGE = "model.ts", "model.pt2"
LENGTH = 16
"""Size of a variable dimension in the example input; later, any length is accepted."""


class TorchOptions(Options):
    """What a target may set under `options`."""

    mode: Literal["eager", "torchscript", "compile", "aotinductor"] = "compile"
    """`eager` is the network as trained; `torchscript` is traced and frozen; `compile` is `torch.compile`, repeated in
    each process; `aotinductor` is compiled once, ahead of time. The last two need a C++ compiler."""

    @property
    def compiles(self) -> bool:
        """Whether it needs a C++ compiler."""
        return self.mode in ("compile", "aotinductor")


class TorchRunner:
    """A callable on tensors. Threads are set for the whole process: PyTorch has no other way."""

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor], manifest: CandidateManifest, threads: int) -> None:
        torch.set_num_threads(threads)
        self._call = call
        self._shape, self._dtype = manifest.input_shape, np.dtype(manifest.input_dtype)

    def run(self, batch: Array) -> Array:
        """Return (N, …) float32 outputs for inputs (N, …)."""
        require_batch(batch, self._shape, self._dtype)
        inputs = np.require(batch, requirements=["C", "W"])  # compiled code relies on the layout; PyTorch may write
        with torch.inference_mode():
            outputs: Array = self._call(torch.from_numpy(inputs)).float().numpy()
        return outputs


class Torch:
    """The engine `torch`."""

    distributions = ("torch",)

    def check(self, target: Target) -> None:
        """Raise EngineError for an unsupported device or precision, or without the compiler that it needs."""
        options = read_options(target, TorchOptions)
        if target.device != "CPU":
            raise EngineError(f"torch: no device {target.device!r}; this engine runs on CPU only")
        if target.precision != "f32":
            raise EngineError(f"torch: computes in f32 here, not {target.precision}; set the target's `precision`")
        if options.compiles:
            _require_compiler(options.mode)

    def fingerprint(self, target: Target) -> dict[str, str]:
        """Return version, mode, the instruction sets that code is compiled for and, if used, the compiler."""
        options = read_options(target, TorchOptions)
        entries = {
            "torch": digests.versions("torch")["torch"],
            "device": target.device,
            "cpu_features": hardware.describe()["cpu_features"],
            "precision": target.precision,
            "mode": options.mode,
        }
        return entries | ({"compiler": _compiler_version()} if options.compiles else {})

    def relations(self, manifest: EngineManifest) -> Mapping[str, Relation]:
        """Return the relations: weights and TorchScript are portable, `compile` compiles on loading, AOTInductor is
        bound."""
        if read_options(manifest.target, TorchOptions).mode == "aotinductor":
            return {}
        return {"torch": Relation.SAME_MAJOR, "cpu_features": Relation.ANY, "compiler": Relation.ANY}

    def build(self, candidate: Path, target: Target, folder: Path) -> None:
        """Write weights, a TorchScript file or an AOTInductor package, depending on the mode, next to the manifest."""
        mode = read_options(target, TorchOptions).mode
        try:
            network = FRAMEWORK.load(candidate)
        except ModelError as error:
            raise EngineError(f"torch: cannot build {candidate.name}: {error}") from error
        if mode in ("eager", "compile"):
            shutil.copytree(candidate, folder, ignore=shutil.ignore_patterns(ONNX), dirs_exist_ok=True)
            return
        shutil.copy(candidate / MANIFEST, folder)
        example, varying = _example(read_manifest(candidate))
        threads = torch.get_num_threads()
        torch.set_num_threads(target.threads)  # AOTInductor writes their number into the code
        try:
            if mode == "torchscript":
                _script(network, example, folder)
            else:
                _package(network, example, varying, folder)
        except Exception as error:  # what tracing, exporting and the compiler raise shares no root but Exception
            raise EngineError(f"torch: cannot build {candidate.name} by {mode}: {_short(error)}") from error
        finally:
            torch.set_num_threads(threads)

    def load(self, folder: Path, target: Target) -> Runner:
        """Load what was built; `compile` compiles at the first call of a shape."""
        return TorchRunner(
            _load(folder, read_options(target, TorchOptions).mode), read_manifest(folder), target.threads
        )


def _load(folder: Path, mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
    loaded: Callable[[torch.Tensor], torch.Tensor]
    if mode == "torchscript":
        loaded = torch.jit.load(folder / SCRIPT)
    elif mode == "aotinductor":
        loaded = torch._inductor.aoti_load_package(str(folder / PACKAGE))
    else:
        network = FRAMEWORK.load(folder)
        loaded = torch.compile(network) if mode == "compile" else network
    return loaded


def _script(network: torch.nn.Module, example: torch.Tensor, folder: Path) -> None:
    """Trace and freeze: weights become constants, so that operators can be fused."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.freeze(torch.jit.trace(network, example)).save(folder / SCRIPT)


def _package(network: torch.nn.Module, example: torch.Tensor, varying: list[int], folder: Path) -> None:
    """Export with the variable dimensions, and compile."""
    dimensions = {i: torch.export.Dim(f"d{i}", min=1) for i in varying}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (example,), dynamic_shapes=(dimensions,))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / PACKAGE))


def _example(manifest: CandidateManifest) -> tuple[torch.Tensor, list[int]]:
    """Return an input of two samples (ones, since token ids of 0 are padding), and its variable dimensions."""
    shape = [LENGTH if size == -1 else size for size in manifest.input_shape]
    varying = [0, *(i for i, size in enumerate(manifest.input_shape, start=1) if size == -1)]
    return torch.from_numpy(np.ones((2, *shape), manifest.input_dtype)), varying


def _compiler() -> str:
    """Return the compiler that PyTorch uses: it reads the same variable."""
    return os.environ.get("CXX", "g++")


def _require_compiler(mode: str) -> None:
    if shutil.which(_compiler()) is None:
        raise EngineError(
            f"torch: options.mode {mode} needs a C++ compiler, and there is no {_compiler()!r}; install one (Debian: "
            "g++), name another in CXX, or set options.mode to torchscript"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if mode == "compile" and not header.exists():
        raise EngineError(
            "torch: options.mode compile needs Python's C headers (Debian: python3-dev); install them, or set "
            "options.mode to aotinductor"
        )


def _compiler_version() -> str:
    completed = subprocess.run([_compiler(), "-dumpfullversion"], capture_output=True, text=True, check=False)
    return f"{Path(_compiler()).name} {completed.stdout.strip()}"


def _short(error: Exception) -> str:
    """Return the first line of what may be pages of compiler output."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


ENGINE = Torch()
