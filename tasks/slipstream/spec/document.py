"""The text of a spec as plain data: strict YAML of bounded size, in which every error is a SpecError with its line.

Specs are read by every process that parses DAGs, so a hostile or damaged file must cost milliseconds and raise only
SpecError. In addition to `yaml.safe_load`, duplicate keys are rejected, and size, depth and aliases are bounded.
"""

import reprlib
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from slipstream.errors import SpecError

MAX_BYTES = 256 * 1024
"""Largest spec file. The examples have at most a hundredth of it."""
MAX_DEPTH = 20
"""Deepest nesting; a valid spec has five levels."""
MAX_NODES = 10_000
"""Maximum values, with each alias counted as a copy: a "billion laughs" file exceeds it at once."""
MAX_MESSAGE = 400
"""Longest line of an error, in characters."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with bounds. Merge keys (`<<`) work; a key in the mapping itself overrides a merged one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._nodes = 0
        self._sizes: dict[int, int] = {}  # id of a complete node → its values, aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one value. Raise ComposerError beyond the bounds."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call] # the stubs have no types for it
        before = self._nodes
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _refused(f"alias *{event.anchor} is inside what it stands for", event.start_mark)
            self._nodes += self._sizes[id(node)]
        else:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > MAX_NODES:
            raise _refused(f"more than {MAX_NODES} values, aliases expanded", event.start_mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping. Raise ComposerError if it has a duplicate key.

        This is not done in the constructor, which by then has expanded merge keys into legitimate duplicates.
        """
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        keys: list[yaml.Node] = [key for key, _ in node.value]
        for key in keys:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (name := (key.tag, key.value)) in lines:
                twice = f"key {shown(key.value)} is given twice, first in line {lines[name]}; remove one"
                raise _refused(twice, key.start_mark)
            lines[name] = key.start_mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct a value. PyYAML's converters raise whatever Python does: ValueError for a date such as 2020-99-99
        or an integer of more than 4,300 digits, OverflowError, AttributeError."""
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:
            kind = node.tag.rpartition(":")[2]
            raise ConstructorError(
                None, None, f"{shown(node.value)} is no valid {kind}; if it is text, quote it", node.start_mark
            ) from error


def decode(content: bytes, source: str) -> str:
    """Decode a spec's bytes; `source` names it in errors. Raise SpecError."""
    if len(content) > MAX_BYTES:
        raise SpecError(f"{source}: larger than {MAX_BYTES // 1024} KiB, which no spec is")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise SpecError(f"{source}: cannot be read: not UTF-8 text: {error}") from None


def read(text: str, source: str) -> Any:
    """Parse a spec's text; `source` names it in errors. Raise SpecError."""
    if len(text) > MAX_BYTES:
        raise SpecError(f"{source}: larger than {MAX_BYTES // 1024} KiB, which no spec is")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 # a SafeLoader
    except yaml.YAMLError as error:
        raise SpecError(shortened(f"{source}: not valid YAML: {_explain(error)}")) from None


def _refused(problem: str, mark: Any) -> ComposerError:
    return ComposerError(None, None, problem, mark)


def _explain(error: yaml.YAMLError) -> str:
    """Return one line: where, what, and PyYAML's context."""
    if isinstance(error, ReaderError):
        return f"character {error.position + 1} is U+{error.character:04X}, which YAML does not allow"
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}: " if mark is not None else ""
    context = f" ({error.context})" if error.context else ""
    return f"{where}{error.problem or error.note}{context}"


class _Shown(reprlib.Repr):
    """Short forms of any value. It never expands more than a few items of each of two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 6
        self.maxstring = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        """Return an integer's repr; Python refuses to print more than 4,300 digits."""
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 128 else repr(x)


_short = _Shown()


def shown(value: object) -> str:
    """Return a value for an error: its repr, in a bounded number of characters however large or deep the value is."""
    return _short.repr(value)


def shortened(text: str, longest: int = MAX_MESSAGE) -> str:
    """Return a line of an error, cut in its middle if too long: its beginning says where, its end what to do."""
    if len(text) <= longest:
        return text
    half = (longest - 3) // 2
    return f"{text[:half]} … {text[-half:]}"
