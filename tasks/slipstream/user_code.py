"""The functions that a spec names as `module:function`, and what identities know of them."""

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from slipstream import digests
from slipstream.contract import digest
from slipstream.errors import SpecError
from slipstream.home import Home
from slipstream.spec import Call


def user_function(call: Call) -> Callable[..., Any]:
    """Import a function from the user's code. Raises SpecError when it is not there.

    Only modules below SLIPSTREAM_CODE: the name may come from a manifest in the artifact store, and `os:system` is a
    function too. Where the file lies is known before anything is imported.
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
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SpecError(f"{call.function}: cannot import {module_name} from {code}: {error}") from error
    if not (module.__file__ and file.samefile(module.__file__)):
        raise SpecError(
            f"{call.function}: {file} is hidden by {module.__file__ or 'a built-in module'} of the same name; rename it"
        )
    function = getattr(module, name, None)
    if not callable(function):
        raise SpecError(f"{call.function}: {module_name} has no function {name}")
    found: Callable[..., Any] = function
    return found


def user_code_digest(call: Call | None) -> str | None:
    """Digest of a user function: its name, its parameters and its code; part of a step's identity."""
    if call is None:
        return None
    code = {name: digests.file(path) for name, path in _code_of(call).items()}
    return digest({"function": call.function, "params": call.params, "code": code})


def _code_of(call: Call) -> dict[str, Path]:
    """Name → file of the modules that name and define a function, and of the user's code that they reach by imports.

    Import statements are read from the text, those inside functions too, and nothing is run: what is loaded by
    `importlib.import_module` is not seen. Other packages are left out. Names, since paths differ between machines.
    """
    function, code = user_function(call), Home.from_environment().code
    own = {call.function.partition(":")[0], function.__module__}
    waiting = {name: Path(file) for name in own if (file := getattr(sys.modules.get(name), "__file__", None))}
    found: dict[str, Path] = {}
    while waiting:
        name, path = waiting.popitem()
        found[name] = path
        reached = {n: _module_file(n, code) for n in _imports(name, path) if n not in found}
        waiting = {n: file for n, file in reached.items() if file is not None} | waiting
    return found


def _imports(name: str, path: Path) -> set[str]:
    """Modules that the file of module `name` may import, and the packages that they and it are in."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = {name}
    try:
        for node in ast.walk(ast.parse(path.read_bytes())):
            found.update(_imported(node, package))
    except (SyntaxError, ValueError):  # not this Python's, or compiled; its bytes count all the same
        pass
    return {".".join(parts[: i + 1]) for parts in (module.split(".") for module in found) for i in range(len(parts))}


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """Names in an import statement that may be modules: of `from a import b`, both a and a.b."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        try:
            origin = resolve_name("." * node.level + (node.module or ""), package)
        except ImportError:  # more dots than packages
            return
        yield from (origin, *(f"{origin}.{alias.name}" for alias in node.names))


def _module_file(name: str, code: Path) -> Path | None:
    """The file of a module in the folder `code`, where it has one: a folder without `__init__.py` is a package too.

    Python's own finder would need that package imported to look into it.
    """
    place = code.joinpath(*name.split("."))
    files = [place / "__init__.py", *(place.with_name(place.name + s) for s in (*EXTENSION_SUFFIXES, *SOURCE_SUFFIXES))]
    return next((file for file in files if file.is_file()), None)
