"""How far two forms of a model may be apart on the same samples.

Answers may have any shape (N, …). The measures are the largest difference, for results that should be equal except for
the order of sums, and the relative error |x - y|₂ / |x|₂ over all samples, for rounded results. The latter is the
signal to quantization noise ratio (SQNR) in another unit: 20 dB are 0.1.
"""

from dataclasses import dataclass

import numpy as np

from slipstream.contract.arrays import FloatArray

FLOOR = 8 * 2.0**-23
"""A difference that is rounding whatever the answers are, about 1e-6: eight units in the last place of FP32 at 1.

A share of the answers is not enough if all of them are close to 0. The last layer computes a probability from terms
near 1/2 (ONNX Runtime's sigmoid has steps of 6e-8 there), so correct kernels give 2e-7 and 1e-7 for 0."""


TINY = 1e-12
"""Smallest norm of the answers that an error is divided by."""


@dataclass(frozen=True)
class Bound:
    """Allowed difference between two forms of a model."""

    form: str
    """Precision, for messages."""
    largest: float = float("inf")
    """Largest difference, as a share of the largest answer, but never less than FLOOR."""
    relative: float = float("inf")
    """Relative error."""
    labels: float = 0.5
    """Minimum share of samples with the same label, if answers are class scores (N, classes)."""


EXACT = Bound("FP32", largest=1e-3)
"""Nothing is rounded: kernels only sum in another order."""
QUANTIZED = Bound("quantized", relative=0.5)
"""6 dB: anything worse is noise. Whether a smaller error is acceptable is for the accuracy gate."""
ROUNDED = {"f16": Bound("FP16", relative=0.05), "bf16": Bound("BF16", relative=0.2)}
"""A hundred and fifty times the rounding of one operation (2⁻¹¹ and 2⁻⁸), since errors add up along a network."""


REPEATED_LABELS = 0.9
REPEATED = {
    "f32": Bound("FP32", largest=1e-3, labels=REPEATED_LABELS),
    "f16": Bound("FP16", relative=0.01, labels=REPEATED_LABELS),
    "bf16": Bound("BF16", relative=0.05, labels=REPEATED_LABELS),
}
"""Between two loads of the same engine: weights and ranges are the same bytes, so only the kernels' sums differ."""
REPEATED_QUANTIZED = Bound("quantized", relative=0.05, labels=REPEATED_LABELS)
"""A ResNet-14 in INT8 gave the same bits under two older versions each of OpenVINO and ONNX Runtime. Sums that saturate
in 16 bits (AVX2 instead of VNNI) moved it by 0.013, and three projections of an attention by 0.07."""


def repeated(precision: str, *, quantized: bool) -> Bound:
    """Return the bound for an engine loaded again, under another version of its library or on another processor."""
    return REPEATED_QUANTIZED if quantized else REPEATED.get(precision, REPEATED["f32"])


def bound_for(precision: str, *, quantized: bool) -> Bound:
    """Return the bound for computation in `precision` (f32, f16, bf16), from quantized weights or not."""
    if quantized:
        return QUANTIZED
    return ROUNDED.get(precision, EXACT)


@dataclass(frozen=True)
class Agreement:
    """Difference between two forms of a model."""

    max_abs_diff: float
    """Largest difference, in the unit of the answers."""
    largest: float
    """Largest expected answer."""
    relative_error: float
    labels: float | None
    """Share of samples with the same label; None if the answers are not class scores."""

    def metrics(self) -> dict[str, float]:
        """Return `max_abs_diff`, `relative_error`, and `agreement` (of labels) if there are labels."""
        figures = {"max_abs_diff": self.max_abs_diff, "relative_error": self.relative_error}
        return figures if self.labels is None else figures | {"agreement": self.labels}


def measure(expected: FloatArray, got: FloatArray) -> Agreement:
    """Compare finite answers of the same shape (N, …), N ≥ 1."""
    exact, difference = expected.astype(np.float64), np.abs(got.astype(np.float64) - expected)
    scores = expected.ndim == 2 and expected.shape[1] > 1
    return Agreement(
        max_abs_diff=float(difference.max(initial=0.0)),
        largest=float(np.abs(exact).max(initial=0.0)),
        relative_error=float(np.linalg.norm(difference) / max(float(np.linalg.norm(exact)), TINY)),
        labels=float((got.argmax(1) == expected.argmax(1)).mean()) if scores else None,
    )


def explain_mismatch(expected: FloatArray, got: FloatArray, bound: Bound) -> str | None:
    """Return why two forms of a model do not agree, as a phrase to follow its name; None if they do."""
    if got.shape != expected.shape:
        return f"answers {got.shape} instead of {expected.shape}"
    if not np.isfinite(got).all():
        return "answers NaN or infinity"
    agreement = measure(expected, got)
    return None if agreement.max_abs_diff <= FLOOR else _beyond(agreement, bound)


def _beyond(agreement: Agreement, bound: Bound) -> str | None:
    """Return which measure is beyond the bound."""
    limit = max(bound.largest * agreement.largest, FLOOR)
    if agreement.max_abs_diff > limit:
        return f"differs by up to {agreement.max_abs_diff:.3g}, where {bound.form} explains {limit:.3g}"
    if agreement.relative_error > bound.relative:
        return (
            f"is broken, not imprecise: its error is {agreement.relative_error:.3g} of the answers, where "
            f"{bound.form} explains {bound.relative:g}"
        )
    if agreement.labels is not None and agreement.labels < bound.labels:
        return f"is broken, not imprecise: it gives the same label for only {agreement.labels:.0%} of the samples"
    return None
