"""What the spec accepts as a schedule, Airflow accepts too, and it comes due."""

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.spec.schedule import PRESETS, schedule

USUAL = (
    "0 3 * * 1", "*/5 0-6 * * MON-FRI", "30 3 1,15 * *", "0 0 L * *", "0 12 * * 1#2", "0 0 29 2 *", "0 22-6 * * *",
    "5/10 * * * *", "0 0 31 4,6 1", "0  3 * * sun,6", "0 0 * NOV-FEB *", "0 0 * * L5",
    "0 0 8-14 * 1#2", "0 0 L * L5", "0 0 L * 1#4",
)  # fmt: skip
REFUSED = (
    "61 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 13 *", "* * * * 8", "*/0 * * * *", "0 0 30 2 *",
    "0 0 31 4,6 *", "0 0 1 * 1#2", "0 0 L 1 1#4", "1,,2 * * * *", "1-2-3 * * * *", "* * * * 1#6", "H * * * *",
    "* * * foo *", "0 3 * *", "0 3 * * 1 2026", "@fortnightly", "often", "٣ * * * *", "1_0 * * * *",
)  # fmt: skip
item = st.one_of(
    st.just("*"),
    st.integers(0, 62).map(str),
    st.tuples(st.integers(0, 62), st.integers(0, 62)).map(lambda r: f"{r[0]}-{r[1]}"),
    st.sampled_from(["mon", "FRI-MON", "jan", "DEC-feb", "L", "1#2", "L5", "*/7", "3/4", "1-9/0", "0-5/3", "x", ""]),
)
field = st.lists(item, min_size=1, max_size=3).map(",".join)
expression = st.tuples(field, field, field, field, field).map(" ".join)


def ours(text: str) -> bool:
    try:
        schedule(text)
    except ValueError:
        return False
    return True


def airflows(text: str) -> bool:
    """Whether Airflow makes a timetable of it that has a next date."""
    from airflow.exceptions import AirflowTimetableInvalid
    from airflow.timetables.trigger import CronTriggerTimetable
    from croniter import CroniterError, croniter

    table = CronTriggerTimetable(text, timezone="UTC")
    try:
        table.validate()
        croniter(table._expression, datetime(2026, 1, 1, tzinfo=UTC)).get_next()
    except (AirflowTimetableInvalid, CroniterError):
        return False
    return True


@pytest.mark.parametrize("text", [*PRESETS, *USUAL])
def test_usual_schedules_are_accepted_by_both(text: str, airflow_home: object) -> None:
    assert ours(text) and airflows(text)


@pytest.mark.parametrize("text", REFUSED)
def test_what_airflow_would_refuse_is_refused(text: str, airflow_home: object) -> None:
    assert not ours(text) and not airflows(text)


@settings(deadline=None, max_examples=500)
@given(expression)
def test_what_passes_here_passes_in_airflow(airflow_home: object, text: str) -> None:
    assert airflows(text) or not ours(text)
