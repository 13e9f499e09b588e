"""Digests of files, folders and source code, which identify artifacts and results."""

import hashlib
import importlib.metadata
import importlib.util
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent
OWN = __name__.partition(".")[0]
GZIP = zlib.MAX_WBITS + 16
"""Flag that makes zlib write gzip's format."""


def file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


STORED = ".slipstream.json"
"""File that storage adds to a folder in S3 (storage/remote.py): not part of the folder itself."""


def folder(path: Path) -> str:
    """Return the sha256 over the relative names and digests of all files below a folder; times and modes do not
    count."""
    return _combined(path, sorted(p for p in path.rglob("*") if p.is_file() and p != path / STORED))


def _combined(base: Path, files: Iterable[Path]) -> str:
    """Return one sha256 over files, in their order: their names relative to `base`, and their digests."""
    total = hashlib.sha256()
    for path in files:
        total.update(f"{path.relative_to(base).as_posix()}\0{file(path)}\n".encode())
    return total.hexdigest()


def folder_size(path: Path) -> int:
    """Return the total bytes of all files below a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def folder_gzip_size(path: Path) -> int:
    """Return the same with each file compressed by gzip, as for a download: only here do pruned zeros save space."""
    total = 0
    for entry in (p for p in path.rglob("*") if p.is_file()):
        packer = zlib.compressobj(wbits=GZIP)
        with entry.open("rb") as stream:
            while block := stream.read(2**20):
                total += len(packer.compress(block))
        total += len(packer.flush())
    return total


@cache
def source(*parts: str) -> str:
    """Return the digest of this package's own code: files or folders named relative to it, such as `engines`."""
    paths = [PACKAGE / part for part in parts]
    return _combined(PACKAGE, [f for path in paths for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])])


def code(module: str, *parts: str) -> str:
    """Return the digest of the code behind a module named by its dotted path, and of parts of this package.

    Of another package all modules count, since what its module imports is not declared here.
    """
    package, _, path = module.partition(".")
    if package == OWN:
        return source(f"{path.replace('.', '/')}.py", *parts)
    return f"{package_source(package)} {source(*parts)}"


@cache
def package_source(package: str) -> str:
    """Return the digest of all Python files of a top-level package, or of a single module. Raise ImportError."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ImportError(f"{package}: no such package, or one without an __init__.py")
    origin = Path(spec.origin)
    return _combined(
        origin.parent, sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]
    )


def plugin(module: str) -> dict[str, str]:
    """For the settings of a step: what stands for the code of another package's module; nothing for one of ours."""
    package = module.partition(".")[0]
    return {} if package == OWN else {package: package_source(package)}


def versions(*distributions: str) -> dict[str, str]:
    """Return installed versions of distributions; `absent` for one that is not installed."""
    version_of = {}
    for name in distributions:
        try:
            version_of[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version_of[name] = "absent"
    return version_of
