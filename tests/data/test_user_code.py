"""What the digest of a function that a spec names covers."""

import importlib
import io
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slipstream.data.user_code import blamed, user_code_digest, user_function
from slipstream.errors import CodeError, SpecError, Unavailable
from slipstream.spec import Call

CODE = {
    # A folder without __init__.py, as examples/ is.
    "mine/networks.py": """
import json
from mine import layers as parts
from .blocks import block

def network(width=4):
    import toolbox.deep.inner as inside

def student():
    pass
""",
    "mine/layers.py": "from toolbox import shapes\n",
    "mine/blocks.py": "import mine.networks\ndef block():\n    from . import late\n",
    "mine/late.py": "try:\n    import newer\nexcept ImportError:\n    from .... import beyond\n",
    "newer.py": "match = 1 +\n",
    "toolbox/__init__.py": "",
    "toolbox/shapes.py": "",
    "toolbox/deep/__init__.py": "",
    "toolbox/deep/inner.py": "from ..sizes import SIZE\n",
    "toolbox/sizes.py": "SIZE = 3\n",
    "toolbox/unused.py": "",
    "mine/unused.py": "",
}
UNUSED = ("toolbox/unused.py", "mine/unused.py")
NETWORK = Call(function="mine.networks:network")


@pytest.fixture
def code(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's code: modules that import one another."""
    for name, text in CODE.items():
        path = tmp_path / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    use(tmp_path / "code", monkeypatch)
    yield tmp_path / "code"
    forget()


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the user's code from a folder."""
    forget()
    monkeypatch.setenv("SLIPSTREAM_CODE", str(folder))
    monkeypatch.syspath_prepend(folder)


def forget() -> None:
    """Unload the user's code."""
    for name in [
        n for n in sys.modules if n.partition(".")[0] in ("mine", "toolbox", "newer", "installed", "faulty", "broken")
    ]:
        del sys.modules[name]


def test_a_functions_name_and_parameters_are_part_of_its_digest(code: Path) -> None:
    calls: list[dict[str, Any]] = [
        {"function": "mine.networks:network"},
        {"function": "mine.networks:student"},
        {"function": "mine.networks:network", "params": {"width": 8}},
    ]
    assert len({user_code_digest(Call(**call)) for call in calls}) == 3
    assert user_code_digest(NETWORK) == user_code_digest(NETWORK)
    assert user_code_digest(None) is None


@pytest.mark.parametrize("name", CODE)
def test_all_code_that_a_function_reaches_counts_and_no_other(code: Path, name: str) -> None:
    before = user_code_digest(NETWORK)
    with (code / name).open("a") as file:
        file.write("# changed\n")
    assert (user_code_digest(NETWORK) == before) == (name in UNUSED)


def test_nothing_is_imported_for_a_digest(code: Path) -> None:
    user_code_digest(NETWORK)
    assert not {"mine.late", "newer", "toolbox.deep"} & set(sys.modules)


def test_the_same_code_elsewhere_has_the_same_digest(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = user_code_digest(NETWORK)
    shutil.copytree(code, tmp_path / "elsewhere" / "code")
    shutil.rmtree(code)
    use(tmp_path / "elsewhere" / "code", monkeypatch)
    assert user_code_digest(NETWORK) == before


def test_an_installed_function_that_the_users_code_imports_counts(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "installed"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from installed.inner import network\n")
    (package / "inner.py").write_text("def network():\n    pass\n")
    (code / "mine" / "given.py").write_text("from installed import network\n")
    monkeypatch.syspath_prepend(package.parent)
    digests = set()
    for text in ("# one\n", "# two\n"):
        with (package / "inner.py").open("a") as file:
            file.write(text)
        digests.add(user_code_digest(Call(function="mine.given:network")))
    assert len(digests) == 2


@pytest.mark.parametrize("function", ["os:system", "subprocess:run", "installed:network", "installed.inner:network"])
def test_functions_outside_the_users_code_are_refused_before_anything_is_imported(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    package, trace = tmp_path / "site-packages" / "installed", tmp_path / "imported"
    package.mkdir(parents=True)
    for name in ("__init__.py", "inner.py"):
        (package / name).write_text(f"open({str(trace)!r}, 'w').close()\ndef network():\n    pass\n")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(SpecError, match=rf"^{function}: cannot import \S+ from {code}: no such file there"):
        user_function(Call(function=function))
    assert not trace.exists()


def test_a_module_that_another_one_hides_is_refused(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code / "os.py").write_text("def system(command):\n    return command\n")
    with pytest.raises(SpecError, match=rf"^os:system: {code / 'os.py'} is hidden by \S*os.py of the same name"):
        user_function(Call(function="os:system", params={"command": "true"}))
    hiding = tmp_path / "earlier" / "mine"
    hiding.mkdir(parents=True)
    (hiding / "__init__.py").touch()
    (hiding / "networks.py").write_text("def network():\n    pass\n")
    monkeypatch.syspath_prepend(hiding.parent)
    with pytest.raises(SpecError, match=r"networks.py is hidden by .*earlier/mine/networks.py"):
        user_function(NETWORK)


FAULTS = {
    "exits with 3": (
        "import sys\ndef data():\n    sys.exit(3)\n",
        "faulty.py:3: sys.exit(3): code that slipstream calls",
    ),
    "exits with 0": ("import sys\ndef data():\n    sys.exit(0)\n", "faulty.py:3: sys.exit(0)"),
    "exits": ("def data():\n    raise SystemExit\n", "faulty.py:2: sys.exit()"),
    "exits at import": ("raise SystemExit('no')\n", "faulty.py:1: sys.exit('no')"),
    "does not parse": ("def data(:\n    pass\n", "faulty.py:1: SyntaxError: "),
    "does not parse below": ("def data():\n    import broken\n", "broken.py:2: SyntaxError: "),
    "fails at import": ("x = 1\n1 / 0\n", "faulty.py:2: ZeroDivisionError: division by zero"),
    "lacks a package": (
        "import no_such_package\n",
        "faulty.py:1: ModuleNotFoundError: No module named 'no_such_package'",
    ),
    "raises": ("def data():\n    raise KeyError('x')\n", "faulty.py:2: KeyError: 'x'"),
    "raises in a library": ("import json\ndef data():\n    return json.loads('{')\n", "faulty.py:3: JSONDecodeError: "),
    "raises what is no Exception": (
        "class Own(BaseException): ...\ndef data():\n    raise Own('x')\n",
        "faulty.py:3: Own: x",
    ),
    "asks": ("def data():\n    input('which? ')\n", "faulty.py:2: EOFError: EOF when reading a line; a step has no"),
    "recurses": ("def data():\n    data()\n", "faulty.py:2: RecursionError: "),
    "takes other parameters": ("def data(*, a):\n    pass\n", "faulty:data: TypeError: data() missing 1 required"),
    "says much": ("def data():\n    raise ValueError('x' * 10**6)\n", "faulty.py:2: ValueError: x"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_users_code_names_file_and_line(code: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    text, said = FAULTS[fault]
    (code / "faulty.py").write_text(text)
    (code / "broken.py").write_text("pass\nx = = 1\n")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    importlib.invalidate_caches()
    with pytest.raises(CodeError, match=re.escape(said)) as told:
        user_function(Call(function="faulty:data"))()
    assert str(told.value).startswith("faulty:data: ")
    assert len(str(told.value)) < 700 and "\n" not in str(told.value)
    assert told.value.exit_code == 2


@pytest.mark.parametrize(
    "error", [Unavailable("S3 is down"), ConnectionResetError(), TimeoutError(), KeyboardInterrupt()]
)
def test_what_a_retry_may_mend_and_what_slipstream_says_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)), blamed("x"):
        raise error


def test_what_slipstream_raises_when_the_users_code_calls_it_is_not_blamed_on_the_code(code: Path) -> None:
    """A training function calls `fit`; what fails in there may be a lost process, which is tried again."""
    (code / "faulty.py").write_text("from slipstream.digests import file\ndef train():\n    file(None)\n")
    importlib.invalidate_caches()
    with pytest.raises(AttributeError):
        user_function(Call(function="faulty:train"))()


def test_a_function_that_is_not_there_is_a_wrong_spec(code: Path) -> None:
    with pytest.raises(SpecError, match="cannot import nowhere from") as told:
        user_function(Call(function="nowhere:data"))
    assert type(told.value) is SpecError
