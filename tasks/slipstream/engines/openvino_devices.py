"""OpenVINO's device strings: one device (`CPU`, `GPU.1`), or several joined by a virtual one.

`AUTO:GPU,CPU` picks one of those named, `HETERO:GPU,CPU` gives each layer to the first that can do it, `MULTI:GPU,CPU`
shares requests out. `AUTO` alone picks from all, and `AUTO:-GPU` from all but one.
"""

from collections.abc import Sequence

VIRTUAL = ("AUTO", "HETERO", "MULTI")


def composed(device: str) -> str | None:
    """The virtual device of a string that has one."""
    kind = device.partition(":")[0]
    return kind if kind in VIRTUAL else None


def candidates(device: str, available: Sequence[str]) -> list[str]:
    """The devices that a string lets OpenVINO use, in its order: those that it names, whether or not they are here."""
    kind, colon, names = device.partition(":")
    if kind not in VIRTUAL:
        return [device]
    if not colon:
        return list(available)
    entries = [name.strip() for name in names.split(",")]
    if kind == "AUTO" and all(name.startswith("-") for name in entries):
        unwanted = [name.removeprefix("-") for name in entries]
        return [d for d in available if not any(_is(d, name) for name in unwanted)]
    return entries


def absent(device: str, available: Sequence[str]) -> list[str]:
    """The devices that a string names and this machine lacks."""
    return [name for name in candidates(device, available) if not any(_is(here, name) for here in available)]


def _is(here: str, name: str) -> bool:
    """Whether a device here is the named one: `GPU` stands for `GPU.0` too."""
    return here == name or here.partition(".")[0] == name
