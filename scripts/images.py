"""Builds the container images with Docker or Podman: `scripts/images.py [--cuda] [--rtx] [ENVIRONMENT ...]`.

Names them slipstream-ENVIRONMENT:VERSION, or VERSION-cuda with PyTorch's CUDA build. Variables: BASE names another base
image, CONTAINER_TOOL one of docker and podman, SOURCE the address of the code for the label. This machine's pip
settings (index, extra indexes, wheels on its disk) hold for the build and stay out of the images.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMAGES = ("airflow", "torch", "tensorflow", "tensorrt", "serve")
"""Environments with an image: containers/NAME/{Dockerfile,constraints.txt} and the extra NAME of pyproject.toml."""
NAMED = ("tensorrt",)
"""Images that are built only when they are named: they need gigabytes from NVIDIA's index, and a GPU to be of use."""
PIP = {"PIP_INDEX_URL": "index-url", "PIP_EXTRA_INDEX_URL": "extra-index-url", "PIP_FIND_LINKS": "find-links"}
"""Build argument, which is also pip's variable → pip's setting."""


def output_of(*command: str) -> str:
    """What a command prints; nothing when it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def tool() -> str:
    """The container tool that answers here."""
    wanted = os.environ.get("CONTAINER_TOOL")
    for name in [wanted] if wanted else ["docker", "podman"]:
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
            return name
    sys.exit(f"{wanted or 'neither docker nor podman'} does not answer: start it, or say in DOCKER_HOST where it is")


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a line for each file."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def reachable(settings: dict[str, str]) -> Iterator[dict[str, str]]:
    """The settings with folders of this machine served on 127.0.0.1 while the context lasts: builds see no folders."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        server = listen(partial(Quiet, directory=folder))
        address = f"http://127.0.0.1:{server.server_port}"
        seen = {
            name: " ".join(served(place, root, address, index=name != "PIP_FIND_LINKS") for place in value.split())
            for name, value in settings.items()
        }
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield seen
        finally:
            server.shutdown()
            server.server_close()


def listen(handler: Callable[..., SimpleHTTPRequestHandler]) -> ThreadingHTTPServer:
    """A server on the checkout's own port when that is free, else on any: the layers' cache covers build arguments."""
    for port in (20000 + zlib.crc32(str(ROOT).encode()) % 10000, 0):
        with contextlib.suppress(OSError):
            return ThreadingHTTPServer(("127.0.0.1", port), handler)
    raise OSError("no free port on 127.0.0.1")


def served(place: str, root: Path, address: str, *, index: bool) -> str:
    """Address of a place that pip looks at; a folder is linked below `root`, an index with the files next to it."""
    path = Path(place.removeprefix("file://"))
    if not path.is_absolute():
        return place
    link = root / str(len(list(root.iterdir())))
    link.symlink_to(path.parent if index else path)
    return f"{address}/{link.name}/{path.name if index else ''}"


def pip_settings() -> dict[str, str]:
    """Return pip's settings on this machine, from its variables or its files, as build arguments.

    An empty variable counts: without PIP_EXTRA_INDEX_URL, pip does not wait for an index that is out of reach.
    """
    found = {}
    for variable, key in PIP.items():
        value = os.environ.get(variable, output_of(sys.executable, "-m", "pip", "config", "get", f"global.{key}"))
        if value or variable in os.environ:
            found[variable] = value
    return found


def build(name: str, tag: str, arguments: dict[str, str], container_tool: str) -> float:
    """Build one image; returns the seconds it took. Exits when it fails."""
    command = [container_tool, "build", "--network=host", "-f", f"containers/{name}/Dockerfile", "-t", tag]
    if container_tool == "podman":
        command.append("--format=docker")  # its own format drops the health check
    command += [f"--build-arg={key}={value}" for key, value in arguments.items()]
    began = time.monotonic()
    if code := subprocess.run([*command, "."], cwd=ROOT, check=False).returncode:
        sys.exit(code)
    return time.monotonic() - began


def megabytes(tag: str, container_tool: str) -> float:
    """Size of an image, unpacked."""
    return int(output_of(container_tool, "image", "inspect", "--format", "{{.Size}}", tag)) / 1e6


def main() -> None:
    """Build the named images, or all."""
    parser = argparse.ArgumentParser(description="Build the container images.")
    parser.add_argument("--cuda", action="store_true", help="PyTorch's CUDA build; tags end in -cuda")
    parser.add_argument("--rtx", action="store_true", help="in the image tensorrt, TensorRT for RTX, from PyPI")
    every = [name for name in IMAGES if name not in NAMED]
    told = f"one of {', '.join(IMAGES)}; default: {', '.join(every)}"
    parser.add_argument("names", nargs="*", metavar="ENVIRONMENT", help=told)
    given = parser.parse_args()
    if unknown := set(given.names) - set(IMAGES):
        parser.error(f"no image {', '.join(sorted(unknown))}; known: {', '.join(IMAGES)}")
    container_tool = tool()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    arguments = {"VERSION": version, "REVISION": revision()}
    arguments |= {key: os.environ[key] for key in ("BASE", "SOURCE") if os.environ.get(key)}
    arguments |= {"EXTRAS": "tensorrt-server tensorrt-rtx"} if given.rtx else {}
    settings = pip_settings()
    if given.cuda:  # wheels and indexes that a machine adds are there for the CPU build
        settings = {"PIP_EXTRA_INDEX_URL": ""} | {k: v for k, v in settings.items() if k == "PIP_INDEX_URL"}
    lines = []
    with reachable(settings) as seen:
        for name in given.names or every:
            tag = f"slipstream-{name}:{version}{'-cuda' if given.cuda else ''}"
            took = build(name, tag, arguments | seen, container_tool)
            lines.append(f"{tag:<32} {megabytes(tag, container_tool):>6.0f} MB {took:>6.0f} s")
    print("\n".join(lines))


def revision() -> str:
    """The commit that is built, and whether something was changed since."""
    commit = output_of("git", "rev-parse", "HEAD") or "unknown"
    return f"{commit}-modified" if output_of("git", "status", "--porcelain") else commit


if __name__ == "__main__":
    main()
