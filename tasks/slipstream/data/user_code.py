"""The functions that a spec names as `module:function`, and their part in identities."""

import ast
import functools
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from importlib.util import resolve_name
from pathlib import Path
from types import FrameType
from typing import Any

from slipstream import digests
from slipstream.contract import digest
from slipstream.errors import CodeError, SlipstreamError, SpecError
from slipstream.home import Home
from slipstream.spec import Call
from slipstream.spec.document import shortened

PACKAGE = digests.PACKAGE


RETRIED = (ConnectionError, TimeoutError, MemoryError)
"""Exceptions of user code that do not mean an error in it: an outage or a busy machine, so a retry may help."""


def user_function(call: Call) -> Callable[..., Any]:
    """Import a function from the user's code. Raise SpecError if it does not exist, CodeError if its module fails.

    The returned function raises CodeError for any exception of the user's code, and for an attempt to exit.

    Only modules below SLIPSTREAM_CODE are allowed: the name may come from a manifest in the artifact store, and
    `os:system` is a function too. The file's location is determined before anything is imported.
    """
    module_name, _, name = call.function.partition(":")
    code = Home.from_environment().code
    file = _module_file(module_name, code)
    if file is None:
        raise SpecError(
            f"{call.function}: cannot import {module_name} from {code}: no such file there; a function of an installed "
            "package must be imported by a module of yours, and named with that"
        )
    if str(code) not in sys.path:
        sys.path.insert(0, str(code))
    with blamed(call.function):
        module = importlib.import_module(module_name)
    if not (module.__file__ and file.samefile(module.__file__)):
        raise SpecError(
            f"{call.function}: {file} is hidden by {module.__file__ or 'a built-in module'} of the same name; rename it"
        )
    function = getattr(module, name, None)
    if not callable(function):
        raise SpecError(f"{call.function}: {module_name} has no function {name}")

    @functools.wraps(function, updated=())
    def called(*arguments: Any, **keywords: Any) -> Any:
        with blamed(call.function):
            return function(*arguments, **keywords)

    return called


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """Raise CodeError, which names `what`, file and line, for exceptions of the user's code within the block.

    This includes SystemExit, whose code would be mistaken for the step's verdict. Slipstream's errors pass through, as
    do errors of slipstream's code that the user's code called (a training function calls `fit`).
    """
    try:
        yield
    except (SlipstreamError, KeyboardInterrupt, GeneratorExit, *RETRIED):
        raise
    except BaseException as error:
        if isinstance(error, Exception) and _is_ours(error):
            raise
        raise CodeError(f"{what}: {told(error)}") from error


def told(error: BaseException) -> str:
    """Return an exception of the user's code in one line: file and line, if known, and the exception."""
    place = _place(error)
    if isinstance(error, SystemExit):
        what = f"sys.exit({'' if error.code is None else repr(error.code)}): code that slipstream calls must not exit"
    elif isinstance(error, EOFError):
        what = f"EOFError: {error}; a step has no terminal to ask at"
    else:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        first = next((line for line in message.splitlines() if line.strip()), "")
        what = f"{type(error).__name__}: {shortened(first)}" if first else type(error).__name__
    return f"{place}: {what}" if place else what


def _place(error: BaseException) -> str | None:
    """Return `file:line` of the last frame in the user's code; for a SyntaxError, of the text that does not parse."""
    if isinstance(error, SyntaxError) and error.filename and _is_users(error.filename):
        return f"{error.filename}:{error.lineno}"
    lines = [f"{f.f_code.co_filename}:{n}" for f, n in traceback.walk_tb(error.__traceback__) if _is_users_frame(f)]
    return lines[-1] if lines else None


def _is_ours(error: Exception) -> bool:
    """Return whether slipstream's code, called by the user's code, raised the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    users = [i for i, frame in enumerate(frames) if _is_users_frame(frame)]
    ours = [i for i, frame in enumerate(frames) if PACKAGE in Path(frame.f_code.co_filename).parents]
    return bool(users) and max(ours, default=-1) > users[-1]


def _is_users_frame(frame: FrameType) -> bool:
    return _is_users(frame.f_code.co_filename)


def _is_users(file: str) -> bool:
    """Return whether a file is the user's: below SLIPSTREAM_CODE, which may also contain slipstream and
    environments."""
    path = Path(file)
    return (
        path.is_relative_to(Home.from_environment().code)
        and not path.is_relative_to(PACKAGE)
        and "site-packages" not in path.parts
    )


def user_code_digest(call: Call | None) -> str | None:
    """Return the digest of a user function: its name, its parameters and its code; part of a step's identity."""
    if call is None:
        return None
    code = {name: digests.file(path) for name, path in _code_of(call).items()}
    return digest({"function": call.function, "params": call.params, "code": code})


def _code_of(call: Call) -> dict[str, Path]:
    """Return the files, by module name, of a function and of the user's code that it reaches through imports.

    Import statements are read from the text, including those inside functions, and nothing is run; modules loaded by
    `importlib.import_module` are not seen. Other packages are left out. Names are used, since paths differ between
    machines.
    """
    function, code = user_function(call), Home.from_environment().code
    own = {call.function.partition(":")[0], function.__module__}
    waiting = {name: Path(file) for name in own if (file := getattr(sys.modules.get(name), "__file__", None))}
    files: dict[str, Path] = {}
    while waiting:
        name, path = waiting.popitem()
        files[name] = path
        reached = {n: _module_file(n, code) for n in _imports(name, path) if n not in files}
        waiting = {n: file for n, file in reached.items() if file is not None} | waiting
    return files


def _imports(name: str, path: Path) -> set[str]:
    """Return modules that the file of module `name` may import, and the packages that contain them and it."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    modules = {name}
    try:
        for node in ast.walk(ast.parse(path.read_bytes())):
            modules.update(_imported(node, package))
    except (SyntaxError, ValueError):  # not this Python's, or compiled; its bytes count all the same
        pass
    return {".".join(parts[: i + 1]) for parts in (module.split(".") for module in modules) for i in range(len(parts))}


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """Yield names in an import statement that may be modules: for `from a import b`, both a and a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        try:
            origin = resolve_name("." * node.level + (node.module or ""), package)
        except ImportError:  # more dots than packages
            return
        yield from (origin, *(f"{origin}.{alias.name}" for alias in node.names))


def _module_file(name: str, code: Path) -> Path | None:
    """Return a module's file in the folder `code`, if any; a folder without `__init__.py` is a package too.

    Python's own finder would have to import that package to look into it.
    """
    place = code.joinpath(*name.split("."))
    files = [place / "__init__.py", *(place.with_name(place.name + s) for s in (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES))]
    return next((file for file in files if file.is_file()), None)
