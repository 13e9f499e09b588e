"""The documents tell the truth: commands exist, cheap ones run, links lead somewhere, generated pages are current."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slipstream import spec as specs
from slipstream.tools.docs import markdown, settings_markdown

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
BIN = Path(sys.executable).parent
CHEAP = ("validate", "schema", "--help")
"""Commands that are really run; of the others, name and options are checked with --help."""


def fences(page: Path, language: str) -> list[str]:
    """Contents of the page's fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line that starts with `$ ` in a console block, and every line of a bash block."""
    found = []
    for page in PAGES:
        lines = [line for block in fences(page, "console") for line in block.splitlines() if line.startswith("$ ")]
        lines += [f"$ {line}" for block in fences(page, "bash") for line in block.splitlines() if line.strip()]
        found += [(page.name, line.removeprefix("$ ")) for line in lines]
    return sorted(set(found))


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value)
def test_command(page: str, command: str) -> None:
    program, *arguments = shlex.split(command.partition(" > ")[0])
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program == ".venv/bin/slipstream":
        _slipstream(arguments)
    else:  # tests/helm looks at those of Kubernetes
        assert program in ("tar", "ssh", "pre-commit", "helm", "kubectl", "pg_dump"), f"{page}: an unknown program"


def _slipstream(arguments: list[str]) -> None:
    if arguments[0] in CHEAP:
        run(arguments)
        return
    helped = " ".join(run([arguments[0], "--help"]).split())
    for option in (a for a in arguments[1:] if a.startswith("-")):
        assert option in helped
    for path in (a for a in arguments[1:] if a.endswith(".yaml")):
        assert (ROOT / path).exists()


def run(arguments: list[str]) -> str:
    done = subprocess.run(
        [str(BIN / "slipstream"), *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_spec_reference_is_current() -> None:
    assert (ROOT / "docs/spec.md").read_text(encoding="utf-8") == markdown(), "run: slipstream schema --markdown"
    settings = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert settings == settings_markdown(), "run: slipstream schema --settings --markdown"


def test_the_readme_shows_the_example() -> None:
    shown = [specs.parse(block, "README.md") for block in fences(ROOT / "README.md", "yaml")]
    assert shown == [specs.load(ROOT / "examples/fashion.yaml")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


def test_blocks_of_code_parse() -> None:
    for page in PAGES:
        for block in fences(page, "python"):
            compile(block, str(page), "exec")
        for block in fences(page, "yaml"):
            yaml.safe_load(block)


def test_exit_codes_are_those_of_the_code() -> None:
    from slipstream import errors

    rows = re.findall(r"^\| (\d) \| ", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert rows == [str(c) for c in (0, errors.EXIT_RETRY, errors.EXIT_INPUT, errors.EXIT_GATE)]


def test_settings_in_the_documents_are_read_somewhere() -> None:
    code = "".join(p.read_text(encoding="utf-8") for folder in ("tasks", "dags") for p in (ROOT / folder).rglob("*.py"))
    named = set(re.findall(r"SLIPSTREAM_[A-Z]+", (ROOT / "docs/operations.md").read_text()))
    assert named and all(name in code for name in named)
