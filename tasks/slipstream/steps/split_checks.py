"""Checks of the splits in the step `check`: are samples distinct, held out, and enough for the spec?"""

import logging
from collections.abc import Iterator

from slipstream.data.splits import Data
from slipstream.errors import DataError, SlipstreamError
from slipstream.measure import gates, sizes
from slipstream.measure.metrics.base import metric_for
from slipstream.plugins import SCHEMES
from slipstream.spec import Spec

log = logging.getLogger(__name__)

TOLERATED = 0.01
"""Share of the test split that may be repeated, or be in the training split too: real data sets have a few accidental
duplicates. An overlap hides at most that share of the drop, and repeats narrow its bound by half of it."""


def problems(spec: Spec, loaded: Data) -> Iterator[SlipstreamError]:
    """Yield what is wrong with the samples of the splits."""
    train, test = (set(split.sample_digests()) for split in (loaded.train, loaded.test))
    yield from _repeated(len(loaded.test), len(test))
    yield from _shared(loaded, train, len(test))
    yield from _enough(spec, loaded, len(test))


def _repeated(samples: int, distinct: int) -> Iterator[SlipstreamError]:
    if samples - distinct > TOLERATED * samples:
        yield DataError(
            f"data: split test has {samples:,} samples, but only {distinct:,} distinct ones; a gate must not count a "
            "sample twice, so give each one once"
        )
    elif samples > distinct:
        log.warning("data: split test has %d samples, of which %d are distinct", samples, distinct)


def _shared(loaded: Data, train: set[bytes], distinct: int) -> Iterator[SlipstreamError]:
    shared = len({d for d in loaded.test.sample_digests() if d in train})
    if shared > TOLERATED * distinct:
        yield DataError(
            f"data: {shared:,} of the {distinct:,} distinct samples of split test are in split train too, so that a "
            "gate would judge what was learned by heart; leave them out of split train"
        )
    elif shared:
        log.warning("data: %d of %d test samples are in split train too; few enough to be tolerated", shared, distinct)


def _enough(spec: Spec, loaded: Data, distinct: int) -> Iterator[SlipstreamError]:
    """Yield an error if the samples are too few for calibration, or ever to prove the margin."""
    sections = [spec.section("quantize", recipe) for recipe in spec.recipes]
    calibrated = [s.samples for s in sections if s is not None and SCHEMES[s.scheme].calibrated]
    if calibrated:
        try:
            loaded.calibration(max(calibrated), spec.seed)
        except DataError as error:
            yield error
    if not metric_for(spec.objective.metric).mean:
        return
    confidence = gates.per_engine(spec.objective.confidence, spec.competing)
    least = sizes.least(spec.objective.max_drop / 100, confidence, graded=":" in spec.objective.metric)
    if distinct < least:
        competing = f", as {spec.competing} engines compete," if spec.competing > 1 else ""
        yield DataError(
            f"data: {distinct:,} test samples can never prove a drop of at most objective.max_drop, "
            f"{spec.objective.max_drop:g} points, even if all are answered equally: at {100 * confidence:.4g} % "
            f"confidence{competing} it takes at least {least:,}; give more test samples, or allow a larger drop"
        )
