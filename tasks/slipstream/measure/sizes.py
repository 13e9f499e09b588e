"""Number of test samples that a margin needs, computed before training from the margin and the discordance.

Discordance is the share of samples that one of the two models gets right and the other does not. It determines the
spread of the paired difference: an engine without any true drop still loses some samples and wins equally many.
"""

import math

from scipy import stats as distributions

from slipstream.measure import betting, stats

POWER = 0.8
"""Probability with which an engine without any drop should pass."""
EXAMPLES = (0.001, 0.01, 0.05)
"""Discordances shown if none was observed: INT8 of a large network, of a small one, and a small student."""


def least(margin: float, confidence: float, *, graded: bool) -> int:
    """Return the fewest samples with which an engine can pass at all: one that answers every sample like the baseline.

    margin: allowed drop, as a fraction. `graded`: scores between 0 and 1 (measure/betting.py), not 0 or 1 (Tango).
    """
    if graded:
        return betting.least_samples(margin, confidence)
    z = float(distributions.norm.ppf(confidence))
    n = max(math.floor(z * z * (1.0 - margin) / margin) - 1, 1)  # Tango's bound without discordant pairs: Wilson's
    while stats.tango(0, 0, n, confidence).high > margin:
        n += 1
    return n


def needed(margin: float, confidence: float, discordance: float, *, graded: bool = False) -> int:
    """Return the samples with which an engine without true drop passes with 80 % probability; at least `least`.

    margin, discordance: fractions. ((z₁·σ₀ + z₂·σ₁) / margin)², with the spread of a paired difference at the margin,
    as in Tango's test, and without a drop (J. Nam, Biometrics 53:1422–1430, 1997). Graded scores take about twice as
    many.
    """
    z1, z2 = (float(distributions.norm.ppf(p)) for p in (confidence, POWER))
    slope = 2.0 * margin - discordance
    won = (math.sqrt(slope * slope + 4.0 * discordance * margin * (1.0 - margin)) - slope) / 4.0
    at_margin, without = math.sqrt(2.0 * won + margin * (1.0 - margin)), math.sqrt(discordance)
    n = math.ceil(((z1 * at_margin + z2 * without) / margin) ** 2)
    return max(2 * n if graded else n, least(margin, confidence, graded=graded))
