"""What is near enough, for answers of any shape."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slipstream.onnx.agreement.bounds import EXACT, QUANTIZED, bound_for, explain_mismatch, measure

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(64, 10)).astype(np.float32)
BOXES = RNG.normal(size=(8, 5, 6)).astype(np.float32)


def noisy(answers: np.ndarray, error: float) -> np.ndarray:
    """Answers with a relative error of this size."""
    noise = np.random.default_rng(1).normal(size=answers.shape)
    return (answers + noise * error * np.linalg.norm(answers) / np.linalg.norm(noise)).astype(np.float32)


@pytest.mark.parametrize("answers", [SCORES, BOXES, SCORES[:, :1]], ids=["scores", "boxes", "one number"])
@pytest.mark.parametrize(
    ("precision", "quantized", "fine", "broken"),
    [("f32", False, 1e-5, 1e-2), ("f16", False, 1e-2, 0.1), ("bf16", False, 0.1, 0.4), ("f32", True, 0.3, 0.8)],
)
def test_what_rounding_explains_is_near_enough(answers, precision, quantized, fine, broken):
    bound = bound_for(precision, quantized=quantized)
    assert explain_mismatch(answers, answers, bound) is None
    assert explain_mismatch(answers, noisy(answers, fine), bound) is None
    assert explain_mismatch(answers, noisy(answers, broken), bound) is not None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("bound", [EXACT, QUANTIZED], ids=["exact", "quantized"])
def test_one_number_that_is_none_is_refused(bad, bound):
    got = BOXES.copy()
    got[3, 2, 1] = bad
    assert "NaN or infinity" in str(explain_mismatch(BOXES, got, bound))


def test_another_shape_is_refused_even_where_numpy_would_broadcast():
    assert "(64, 1) instead of (64, 10)" in str(explain_mismatch(SCORES, SCORES[:, :1], QUANTIZED))


def test_zeros_and_answers_of_another_sample_are_broken():
    assert "broken, not imprecise" in str(explain_mismatch(BOXES, np.zeros_like(BOXES), QUANTIZED))
    assert "broken, not imprecise" in str(explain_mismatch(SCORES, SCORES[::-1], QUANTIZED))


def test_labels_count_where_an_offset_hides_the_error():
    """Scores far from zero: a relative error of a few percent, and yet every other label."""
    expected = SCORES + 100
    got = RNG.permuted(SCORES, axis=1) + 100
    assert measure(expected, got).relative_error < QUANTIZED.relative
    assert "same label for only" in str(explain_mismatch(expected, got, QUANTIZED))


def test_metrics_have_labels_only_for_class_scores():
    assert set(measure(SCORES, SCORES).metrics()) == {"max_abs_diff", "relative_error", "agreement"}
    assert set(measure(BOXES, BOXES).metrics()) == {"max_abs_diff", "relative_error"}


def test_zero_answers_agree_with_themselves():
    zeros = np.zeros((4, 3), np.float32)
    assert explain_mismatch(zeros, zeros, EXACT) is None
    assert explain_mismatch(zeros, zeros + 1, EXACT) is not None


@pytest.mark.parametrize("bound", [EXACT, QUANTIZED, bound_for("bf16", quantized=False)], ids=lambda b: b.form)
def test_units_in_the_last_place_are_rounding_where_all_answers_are_close_to_0(bound):
    """An OCR detector on blank pages answers 1e-9 alone and 1.2e-7 in a batch: steps of its sigmoid."""
    blank = np.full((8, 1, 16, 16), 1e-9, np.float32)
    assert explain_mismatch(blank, blank + np.float32(1.19e-7), bound) is None
    assert explain_mismatch(blank, blank + np.float32(1e-5), bound) is not None


def test_the_floor_hides_nothing_of_answers_of_the_usual_size():
    assert "differs by up to" in str(explain_mismatch(SCORES, SCORES + np.float32(0.01), EXACT))
    assert "differs by up to" in str(explain_mismatch(SCORES * 0.01, SCORES * 0.01 + np.float32(1e-4), EXACT))


@given(st.floats(1e-3, 1e6), st.integers(0, 2**16))
def test_the_unit_of_the_answers_does_not_matter(scale, seed):
    x = np.random.default_rng(seed).normal(size=(16, 4))
    got = noisy(x, 0.3).astype(np.float64)
    assert measure(x * scale, got * scale).relative_error == pytest.approx(measure(x, got).relative_error)
    for bound in (EXACT, QUANTIZED):
        assert (explain_mismatch(x * scale, got * scale, bound) is None) == (explain_mismatch(x, got, bound) is None)
