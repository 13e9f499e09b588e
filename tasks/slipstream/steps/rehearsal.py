"""The builds, rehearsed with a network as it is before training: what an engine does not take is found in seconds.

Otherwise an operator that an engine lacks would be found after training, pruning and distilling. Quantized forms are
not rehearsed.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from slipstream.engines import ENGINES
from slipstream.engines.base import build_engine
from slipstream.errors import EngineError, ModelError, SlipstreamError
from slipstream.spec import Target


def rehearse(
    what: str, save: Callable[[Path], object], targets: Mapping[str, Target], folder: Path
) -> Iterator[SlipstreamError]:
    """What keeps a network from being exported, or built for the targets whose engines are in this environment.

    `save` writes it as a candidate into a folder; `what` is how the problems call it.
    """
    candidate = folder / "candidate"
    try:
        save(candidate)
    except ModelError as error:
        yield ModelError(f"{what}: {error}")
        return
    except Exception as error:  # an exporter's own, of many kinds
        yield ModelError(f"{what} cannot be exported to ONNX: {type(error).__name__}: {error}")
        return
    for name, target in targets.items():
        if ENGINES[target.engine].environment in (None, Path(sys.prefix).name):
            try:
                build_engine(candidate, target, folder / name)
            except (EngineError, ModelError) as error:
                yield EngineError(f"targets.{name}: {what} cannot be built: {error}")
