"""A model that somebody else trained: Magika (Fratantonio et al. 2024) tells from a file's bytes what is in it.

PyPI's `magika` carries it as an ONNX file (Apache 2.0), without its training code. Labelled data is any folder of files
whose types are known; here it is what a few packages consist of, told by the ends of their names.

`python -m examples.onnx_model` writes the model's file to where onnx-model.yaml expects it.
"""

import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
from examples.packages import package

from slipstream import Data, Split

MAGIKA = (
    "magika==1.0.3",
    "magika-1.0.3-py3-none-manylinux_2_28_x86_64.whl",
    "3e9b49134e8116ee40b431664dcbed9e199413efddcce1a173c734b4e0521529",
    "--platform=manylinux_2_28_x86_64",  # the model is the same for every machine; its digest names one file
    "--only-binary=:all:",
)
MODEL = "magika/models/standard_v3_3"
FILES = (
    (
        "Django==5.2.19",
        "django-5.2.19-py3-none-any.whl",
        "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
    ),
    (
        "bokeh==3.9.2",
        "bokeh-3.9.2-py3-none-any.whl",
        "448e07d5ee78231f5bdece3be020024bb98696c0d6b127e0e2df0b8ba8fa9765",
    ),
    (
        "Sphinx==9.0.4",
        "sphinx-9.0.4-py3-none-any.whl",
        "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb",
    ),
    (
        "ansible-core==2.19.14",
        "ansible_core-2.19.14-py3-none-any.whl",
        "d518d0e96fa75bedfe9b0a96d5b158aa712d092961824c115140c8677b88ff06",
    ),
)
"""Requirement, file, sha256."""
TYPES = {
    ".css": "css",
    ".html": "html",
    ".js": "javascript",
    ".json": "json",
    ".png": "png",
    ".po": "po",
    ".ps1": "powershell",
    ".psm1": "powershell",
    ".py": "python",
    ".rst": "rst",
    ".svg": "svg",
    ".ts": "typescript",
    ".yml": "yaml",
}
"""End of a name → Magika's name of the type."""
TEMPLATE = (b"{%", b"{{", b"{#")
"""What pages are filled in by: such a file's name says HTML, but its content is a template's."""
BLOCK, ENDS, PADDING, LEAST = 4096, 1024, 256, 8
"""As Magika's config.min.json says: bytes that are read, that are taken of each end, what fills up, and the least."""
MOST = 250
"""Files of one type, so that the common ones do not hide the others."""


def data(limit=None):
    """About 1,500 files, each 2,048 numbers, in two halves by chance; with `limit`, so many and a quarter of it."""
    names = json.loads(_read(MAGIKA, f"{MODEL}/config.min.json"))["target_labels_space"]
    found = {features.tobytes(): (features, names.index(label)) for features, label in _samples()}  # each file once
    order, taken = [], Counter()
    for key in sorted(found, key=lambda content: hashlib.sha256(content).digest()):
        taken[found[key][1]] += 1
        if taken[found[key][1]] <= MOST:
            order.append(key)
    whole = Split(*(np.stack(part) for part in zip(*(found[key] for key in order), strict=True)))
    half = len(order) // 2
    train, test = np.arange(half), np.arange(half, len(order))
    if limit is not None:
        train, test = train[:limit], test[: max(limit // 4, 1)]
    return Data(train=whole.take(train), test=whole.take(test), classes=tuple(names))


def features(content):
    """(2048,) int32 of a file's bytes: its first and its last, without white space at the ends."""
    first, last = content[:BLOCK].lstrip()[:ENDS], content[-BLOCK:].rstrip()[-ENDS:]
    numbers = np.full(2 * ENDS, PADDING, np.int32)
    numbers[: len(first)] = np.frombuffer(first, np.uint8)
    numbers[2 * ENDS - len(last) :] = np.frombuffer(last, np.uint8)
    return numbers


def _samples():
    """(features, type) of every file of a known type."""
    for wheel in FILES:
        with zipfile.ZipFile(package(*wheel)) as files:
            for name in files.namelist():
                label, content = TYPES.get(PurePosixPath(name).suffix), files.read(name)
                template = label == "html" and any(mark in content for mark in TEMPLATE)
                if label is not None and not template and len(content.strip()) >= LEAST:
                    yield features(content), label


def _read(wheel, name):
    with zipfile.ZipFile(package(*wheel)) as files:
        return files.read(name)


if __name__ == "__main__":
    target = Path(__file__).parent / "models" / "magika.onnx"
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(_read(MAGIKA, f"{MODEL}/model.onnx"))
    print(target)
