"""Files that may end up among the published specs and must harm no other one."""

import os
from collections.abc import Callable
from pathlib import Path

GOOD = """\
name: fashion
model: {registry: models:/net@source, architecture: examples.fashion:resnet}
data: examples.fashion:data
recipes: {int8: [quantize]}
targets: {server: {engine: openvino}}
"""


def bomb(levels: int = 8) -> str:
    """A list of lists of …: nine times as many values at each level."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]" for i in range(levels)]
    return "\n".join(lines) + "\n"


def merge_bomb(levels: int = 8) -> str:
    """The same of merge keys, which PyYAML copies."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 9)}]}}" for i in range(levels)]
    return "\n".join(lines) + "\n"


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return put


def _loop(folder: Path) -> None:
    (folder / "loop.yaml").symlink_to(folder / "loop.yaml")


def _dangling(folder: Path) -> None:
    (folder / "dangling.yaml").symlink_to(folder / "nowhere")


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "pipe.yaml")


def _folder(folder: Path) -> None:
    (folder / "folder.yaml").mkdir()
    (folder / "folder.yaml" / "up").symlink_to(folder)


def _unreadable(folder: Path) -> None:
    _write("unreadable.yaml", GOOD)(folder)
    (folder / "unreadable.yaml").chmod(0)


def _bytes_name(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/latin-\xe9.yaml")).write_text(GOOD)


ODD: dict[str, tuple[Callable[[Path], None], str | None]] = {
    "a space in the name": (_write("fashion (copy).yaml", GOOD), "file's name"),
    "a name of 245 characters": (_write("f" * 245 + ".yaml", GOOD), "file's name"),
    "a newline in the name": (_write("a\nb.yaml", GOOD), "file's name"),
    "a name that is not UTF-8": (_bytes_name, "file's name"),
    "no name": (_write("-.yaml", GOOD), "file's name"),
    "an integer of 5,000 digits": (_write("digits.yaml", GOOD + "seed: " + "9" * 5000), "no valid int"),
    "a hexadecimal integer of 50,000 digits": (_write("hex.yaml", GOOD + "seed: 0x" + "f" * 50_000), "seed: "),
    "a date that is none": (_write("date.yaml", GOOD + "seed: 2020-99-99"), "no valid timestamp"),
    "a timestamp that is none": (_write("stamp.yaml", GOOD + "seed: !!timestamp x"), "no valid timestamp"),
    "brackets 20,000 deep": (_write("deep.yaml", "[" * 20_000), "nested more than"),
    "a bomb": (_write("bomb.yaml", bomb()), "more than 10000 values"),
    "a bomb in a known field": (
        _write("bomb-in.yaml", bomb(2) + GOOD.replace("name: fashion", "name: *a2")),
        "name: must be text",
    ),
    "a bomb of merge keys": (_write("merge.yaml", merge_bomb()), "more than 10000 values"),
    "10 MB": (_write("large.yaml", GOOD + "seed: " + "x" * 10_000_000), "larger than"),
    "a long text in a known field": (_write("long.yaml", GOOD.replace("fashion\n", "y" * 200_000 + "\n")), "name: "),
    "200 wrong keys": (_write("keys.yaml", GOOD + "".join(f"k{i}: 1\n" for i in range(200))), "180 more problems"),
    "an alias to itself": (_write("self.yaml", "a: &a [*a]"), "inside what it stands for"),
    "latin-1": (_write("latin.yaml", GOOD.encode() + b"# \xe9"), "not UTF-8"),
    "an empty file": (_write("empty.yaml", ""), "a spec is a mapping"),
    "control characters": (_write("control.yaml", "name: \x00\x1b"), "does not allow"),
    "a key of control characters": (_write("key.yaml", GOOD + '"\\0\\n": 1'), "unknown key"),
    "a Python object": (_write("object.yaml", "name: !!python/object/apply:os.getcwd []"), "constructor"),
    "two documents": (_write("two.yaml", GOOD + "---\n" + GOOD), "another document"),
    "duplicate keys": (_write("twice.yaml", GOOD + "seed: 1\nseed: 2\n"), "given twice"),
    "another spec's name": (_write("other.yaml", GOOD), "must be the file's name"),
    "a symlink loop": (_loop, None),
    "a dangling link": (_dangling, None),
    "a pipe": (_fifo, None),
    "a folder": (_folder, None),
    "no permission": (_unreadable, "cannot be read" if os.geteuid() else "must be the file's name"),
    "an editor's file": (_write(".#fashion.yaml", GOOD), None),
}
"""What is odd → how to put it into the folder, and what the error about it says; None where the file is ignored."""
