"""How many test samples the objective needs, reported before anything is trained."""

from collections.abc import Iterable

from mlflow.entities import Run

from slipstream.measure import gates, sizes
from slipstream.plugins import VALIDATE
from slipstream.spec import Spec
from slipstream.store.tracking import STEP, Tracking

DISCORDANCE = "discordance_percent"
"""Metric of validate's runs: share of samples that an engine and the baseline scored differently."""


def sentence(spec: Spec, samples: int, observed_percent: float | None) -> tuple[str, bool]:
    """Return how many test samples the objective needs, and whether there are enough at the observed discordance."""
    margin, graded = spec.objective.max_drop / 100, ":" in spec.objective.metric
    confidence = gates.per_engine(spec.objective.confidence, spec.competing)
    shares = sizes.EXAMPLES if observed_percent is None else (observed_percent / 100,)
    needed = [sizes.needed(margin, confidence, share, graded=graded) for share in shares]
    least = sizes.least(margin, confidence, graded=graded)
    enough = samples >= (least if observed_percent is None else needed[0])
    competing = f" each, since {spec.competing} engines compete" if spec.competing > 1 else ""
    where = "of their scores differ" + ("" if observed_percent is None else ", as in the last run")
    counts, percent = (" / ".join(v) for v in ([f"{n:,}" for n in needed], [f"{100 * s:.2g} %" for s in shares]))
    return (
        f"the test split has {'' if enough else 'only '}{samples:,} samples; to show a drop of at most "
        f"{spec.objective.max_drop:g} points at {100 * confidence:.4g} %{competing}, an engine that loses nothing "
        f"needs about {counts} where {percent} {where}, and never fewer than {least:,}"
    ), enough


def observed_percent(tracking: Tracking) -> float | None:
    """Return the greatest discordance among the engines of this spec's last run, or None without one."""
    runs = tracking.search({STEP: VALIDATE})
    newest = _parent(runs[0]) if runs else None
    values = [r.data.metrics[DISCORDANCE] for r in _of(runs, newest) if DISCORDANCE in r.data.metrics]
    return max(values, default=None)


def _of(runs: Iterable[Run], parent: str | None) -> list[Run]:
    return [r for r in runs if _parent(r) == parent]


def _parent(run: Run) -> str | None:
    parent_id: str | None = run.data.tags.get("mlflow.parentRunId")
    return parent_id
