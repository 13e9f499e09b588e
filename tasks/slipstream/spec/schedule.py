"""Schedules: the presets and five-field cron expressions that Airflow accepts, and that come due.

Airflow checks a schedule with croniter, which the core does not install. Everything accepted here is accepted there
(tests/dags/test_schedule.py compares the two); of croniter's grammar only `W`, `R` and hashed values are left out.
"""

import re

PRESETS = ("@hourly", "@daily", "@weekly", "@monthly", "@quarterly", "@yearly")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
FIELDS = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 7, WEEKDAYS),
)
"""Name, smallest and largest value, and names of the values starting from the smallest."""
DAYS = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
"""Days of each month, in a leap year."""
LAST_DAY, WEEKDAY = 2, 4
"""Fields with special forms: `L`, the last day of a month; `1#2`, the second Monday, and `L1`, the last one."""

_ITEM = re.compile(r"(?:\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<step>[0-9]{1,4}))?", re.ASCII)
_NTH = re.compile(r"(?:[0-7]|sun|mon|tue|wed|thu|fri|sat)#[1-5]|L[0-7]", re.ASCII | re.IGNORECASE)


def schedule(value: str) -> str:
    """Raise ValueError, with the field that is wrong, unless Airflow accepts the schedule and it comes due."""
    if value in PRESETS:
        return value
    parts = [part for part in value.split(" ") if part]
    if value.startswith("@") or len(parts) != len(FIELDS):
        raise ValueError(
            f"{value!r} is neither a preset ({', '.join(PRESETS)}) nor a cron expression of five fields such as "
            "`0 3 * * 1`"
        )
    days, months = (_values(value, index, parts[index]) for index in (2, 3))
    for index in (0, 1, 4):
        _values(value, index, parts[index])
    weekdays = parts[WEEKDAY].split(",")
    if all(_NTH.fullmatch(item) for item in weekdays):
        lengths = {DAYS[m - 1] for m in months} | ({28} if 2 in months else set())
        last = "L" in parts[LAST_DAY].split(",")
        if not any((days | {n} if last else days) & _possible(weekdays, n) for n in lengths):
            raise ValueError(f"{value!r} never comes due: no {parts[WEEKDAY]} is a day {parts[LAST_DAY]} of that month")
    # If both are restricted in another way, either day suffices.
    if parts[WEEKDAY] == "*" and days and min(days) > max(DAYS[m - 1] for m in months):
        raise ValueError(f"{value!r} never comes due: no day {min(days)} in that month")
    return value


def _values(expression: str, index: int, text: str) -> set[int]:
    """Return what a field matches; empty if the day depends on the month. Raise ValueError."""
    name, least, greatest, names = FIELDS[index]
    items = text.split(",")
    if index == LAST_DAY and "L" in items:
        items = [item for item in items if item != "L"]
        if not items:
            return set()
    if index == WEEKDAY and all(_NTH.fullmatch(item) for item in items):
        return set()
    matched: set[int] = set()
    for item in items:
        parsed = _ITEM.fullmatch(item)
        if parsed is None or (parsed["step"] is not None and int(parsed["step"]) == 0):
            raise ValueError(f"{expression!r}: {item!r} is no {name} of a cron expression")
        first, last = (_number(parsed[which], least, names) for which in ("first", "last"))
        for number in (first, last):
            if number is not None and not least <= number <= greatest:
                raise ValueError(f"{expression!r}: the {name} {item!r} is not within {least}-{greatest}")
        matched |= _range(first, last, least, greatest, int(parsed["step"]) if parsed["step"] else None)
    return matched


def _possible(weekdays: list[str], length: int) -> set[int]:
    """Return days of a month of this length on which an nth or last weekday (`1#2`, `L5`) can fall."""
    matched: set[int] = set()
    for item in weekdays:
        if item[0] in "Ll":
            matched |= set(range(length - 6, length + 1))
        else:
            nth = int(item.partition("#")[2])
            matched |= set(range(7 * nth - 6, min(7 * nth, length) + 1))
    return matched


def _number(text: str | None, least: int, names: tuple[str, ...]) -> int | None:
    """Return the number that a value stands for; -1 for an unknown name."""
    if text is None:
        return None
    if text.isdigit():
        return int(text[:5])
    return names.index(text.lower()) + least if text.lower() in names else -1


def _range(first: int | None, last: int | None, least: int, greatest: int, step: int | None) -> set[int]:
    """Return values from `first` to `last`; a range that wraps around may match every value in between."""
    if first is None:
        return set(range(least, greatest + 1, step or 1))
    if last is None:
        return {first} if step is None else set(range(first, greatest + 1, step))
    if last < first:
        return set(range(least, last + 1)) | set(range(first, greatest + 1, step or 1))
    return set(range(first, last + 1, step or 1))
