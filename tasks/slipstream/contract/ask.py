"""A question to a separate process, in another environment or for a clean measurement, and its reply; both are
documents.

`python -m MODULE REPLY`, with the question as JSON on standard input: the module writes its reply into the file REPLY.
Its standard output is not parsed, since users' code and libraries print as well.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

Question = TypeVar("Question", bound=BaseModel)
Reply = TypeVar("Reply", bound=BaseModel)
STDERR = 2
"""File descriptor: `sys.stderr` need not be a file, as in a notebook."""
TAIL = 1000
"""Characters at the end of a process's output that an error quotes."""


class Unanswered(Exception):
    """The process ended without a reply; the text is its exit code and the end of its output."""


def ask(
    module: str,
    question: BaseModel,
    reply: type[Reply],
    *,
    python: Path | str = sys.executable,
    timeout_s: float | None = None,
    variables: Mapping[str, str] | None = None,
    quiet: bool = True,
) -> Reply:
    """Return the reply of a module, run by another Python.

    variables: added to this process's environment. quiet: keep its output for the error; otherwise it goes to this
    process's stderr. Raise Unanswered, and subprocess.TimeoutExpired after `timeout_s` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reply.json"
        completed = subprocess.run(
            [str(python), "-m", module, str(path)],
            input=question.model_dump_json(),
            stdout=subprocess.PIPE if quiet else STDERR,
            stderr=subprocess.STDOUT if quiet else None,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env={**os.environ, **(variables or {})},
            check=False,
        )
        if completed.returncode == 0 and path.exists():
            return reply.model_validate_json(path.read_text())
    output = (completed.stdout or "").strip()[-TAIL:]
    raise Unanswered(f"{module} in {python} ended with exit code {completed.returncode}{output and f': {output}'}")


def answer(question: type[Question], function: Callable[[Question], BaseModel]) -> None:
    """Reply to the question of `ask`, when a module is run as a program."""
    reply = function(question.model_validate_json(sys.stdin.read()))
    Path(sys.argv[1]).write_text(reply.model_dump_json())
