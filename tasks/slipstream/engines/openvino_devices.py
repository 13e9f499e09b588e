"""OpenVINO's device strings: one device (`CPU`, `GPU.1`), or several combined by a virtual one.

`AUTO:GPU,CPU` picks one of those named, `HETERO:GPU,CPU` assigns each layer to the first that supports it,
`MULTI:GPU,CPU` distributes requests. `AUTO` alone picks from all, and `AUTO:-GPU` from all but one.
"""

from collections.abc import Sequence

VIRTUAL = ("AUTO", "HETERO", "MULTI")


def composed(device: str) -> str | None:
    """Return the virtual device of a string that has one."""
    kind = device.partition(":")[0]
    return kind if kind in VIRTUAL else None


def candidates(device: str, available: Sequence[str]) -> list[str]:
    """Return the devices that a string lets OpenVINO use, in its order, whether or not they are available."""
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
    """Return the devices that a string names and this machine lacks."""
    return [name for name in candidates(device, available) if not any(_is(here, name) for here in available)]


def _is(here: str, name: str) -> bool:
    """Return whether a device here is the named one: `GPU` also means `GPU.0`."""
    return here == name or here.partition(".")[0] == name
