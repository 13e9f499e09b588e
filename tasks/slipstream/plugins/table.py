"""A table of plug-ins: entries by name, slipstream's own and those that installed packages add by entry points."""

import importlib.metadata
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from functools import cached_property
from typing import TypeVar

log = logging.getLogger(__name__)

Info = TypeVar("Info")

NAME = r"[a-z][a-z0-9_]{0,29}"
"""Pattern of a package's entry names: a name is a key of specs, a part of task ids and of pods' names."""


class Table(MutableMapping[str, Info]):
    """Entries by name, created at first use: the additions of installed packages are not imported earlier."""

    def __init__(self, make: Callable[[], dict[str, Info]]) -> None:
        self._make = make

    @cached_property
    def _entries(self) -> dict[str, Info]:
        return self._make()

    def __getitem__(self, name: str) -> Info:
        return self._entries[name]

    def __setitem__(self, name: str, info: Info) -> None:
        self._entries[name] = info

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def inserted(table: Mapping[str, Info], entries: Mapping[str, Info], before: str) -> dict[str, Info]:
    """Return a table with more entries before one of its own, or at its end if it has none of that name."""
    names = list(table)
    place = names.index(before) if before in table else len(names)
    return {n: table[n] for n in names[:place]} | dict(entries) | {n: table[n] for n in names[place:]}


def installed(group: str, kind: type[Info], taken: Collection[str]) -> dict[str, Info]:
    """Return entries that installed packages add by entry points of a group, by name, in the order of their names.

    An entry point names an object of class `kind`. One that cannot be loaded, or whose name is taken or does not match
    NAME, is left out with a warning: a broken package must not affect what does not use it.
    """
    entries: dict[str, Info] = {}
    for point in sorted(importlib.metadata.entry_points(group=group), key=lambda point: point.name):
        source = f"{group}: {point.name} = {point.value} of {point.dist.name if point.dist else 'an unknown package'}"
        try:
            entry = point.load()
        except (Exception, SystemExit) as error:
            log.warning("%s is left out, since it cannot be loaded: %s: %s", source, type(error).__name__, error)
            continue
        if point.name in taken or point.name in entries:
            log.warning("%s is left out, since there is another of that name", source)
        elif not re.fullmatch(NAME, point.name):
            log.warning("%s is left out, since its name must match %s", source, NAME)
        elif not isinstance(entry, kind):
            log.warning("%s is left out, since it is a %s, not a %s", source, type(entry).__name__, kind.__name__)
        else:
            entries[point.name] = entry
    return entries
