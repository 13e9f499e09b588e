"""A person's approval in place of a verdict that could not be reached; never against one that was reached."""

import datetime
from collections.abc import Iterable

from slipstream.contract import Verdict
from slipstream.spec.sections import Waiver


def waive(verdicts: Iterable[Verdict], waivers: Iterable[Waiver], today: datetime.date) -> tuple[Verdict, ...]:
    """Return the verdicts, with waived inconclusive ones as passes, with name and reason. A failure stays a failure."""
    valid = {w.gate: w for w in waivers if today <= w.until}
    return tuple(
        v.model_copy(update={"answer": "pass", "reason": _waived(v, valid[v.gate])})
        if v.answer == "inconclusive" and v.gate in valid
        else v
        for v in verdicts
    )


def _waived(verdict: Verdict, waiver: Waiver) -> str:
    return f"waived by {waiver.by} until {waiver.until} ({waiver.reason}); not judged: {verdict.reason}"
