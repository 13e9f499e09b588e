"""Data sets: the splits that the user's loader returns, their identity, and the calibration draw."""

import hashlib
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slipstream import storage
from slipstream.contract.arrays import Array
from slipstream.data import tokens
from slipstream.data.user_code import user_function
from slipstream.errors import CodeError, DataError
from slipstream.home import Home
from slipstream.spec import Call, Spec
from slipstream.spec.document import shown

INPUT_DTYPES = ("float32", "int64", "int32", "uint8")
"""Types of inputs that all engines accept."""


@dataclass(frozen=True)
class Split:
    """Samples with labels.

    `inputs` is (N, …) in the dtype (one of INPUT_DTYPES) and layout that the model takes at batch N; `labels` is (N,
    …), numbers in the form that the metric takes: (N,) int64 classes, (N, M, 5) float32 boxes, (N, H, W) int64 maps
    (measure/metrics).
    """

    inputs: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def digest(self) -> str:
        """sha256 over shape, dtype and bytes of inputs and labels."""
        total = hashlib.sha256()
        for array in (self.inputs, self.labels):
            total.update(f"{array.shape}{array.dtype}".encode())
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()

    @cached_property
    def _sample_digests(self) -> list[bytes]:
        rows = np.ascontiguousarray(self.inputs).reshape(len(self), -1)
        ends = tokens.lengths(rows) if tokens.is_token_ids(self.inputs) else [rows.shape[1]] * len(rows)
        return [hashlib.blake2b(row[:end].data, digest_size=16).digest() for row, end in zip(rows, ends, strict=True)]

    def sample_digests(self) -> list[bytes]:
        """Return a 16-byte digest of each sample's input, to detect samples that two splits share.

        A text's padding does not count: the same text may be padded to another length in the other split.
        """
        return list(self._sample_digests)

    def take(self, indices: npt.NDArray[np.intp]) -> "Split":
        """Return the samples at `indices`, in that order."""
        return Split(self.inputs[indices], self.labels[indices])


@dataclass(frozen=True)
class Data:
    """The splits of one data set, and the names of its classes (empty if the loader gives none)."""

    train: Split
    test: Split
    classes: tuple[str, ...] = ()
    tokenizer: str | None = None
    """Tokenizer that converts text to inputs: the JSON of a Hugging Face `tokenizers` file, part of the release."""

    def digests(self) -> dict[str, str]:
        """Return the digest of each split, and of the tokenizer if there is one."""
        digest_of = {"train": self.train.digest, "test": self.test.digest}
        if self.tokenizer is not None:
            digest_of["tokenizer"] = hashlib.sha256(self.tokenizer.encode()).hexdigest()
        return digest_of

    def calibration(self, samples: int, seed: int) -> npt.NDArray[np.intp]:
        """Return indices into `train` of a calibration set of distinct, randomly drawn samples, none of which is in
        `test`.

        Raise DataError if the training split has too few such samples.
        """
        held_out = set(self.test.sample_digests())
        first: dict[bytes, int] = {}
        for index, name in enumerate(self.train.sample_digests()):
            if name not in held_out:
                first.setdefault(name, index)
        own = np.array(list(first.values()), dtype=np.intp)
        if len(own) < samples:
            raise DataError(
                f"data: calibration wants quantize.samples, {samples}, but split train has only {len(own)} distinct "
                f"{'sample that is' if len(own) == 1 else 'samples that are'} not in split test too; lower "
                "quantize.samples or give more training data"
            )
        return np.sort(np.random.default_rng(seed).choice(own, samples, replace=False))


def load(spec: Spec) -> Data:
    """Load the spec's data set and check it. Raise DataError."""
    if isinstance(spec.data, Call):
        try:
            data = user_function(spec.data)(**spec.data.params)
        except CodeError as error:
            raise CodeError(f"data: {error}") from error
        if not isinstance(data, Data):
            raise DataError(f"data: {spec.data.function} returned {type(data).__name__}, not slipstream.Data")
    else:
        tokenizer = None if spec.data.tokenizer is None else _read_text(spec.data.tokenizer)
        data = Data(train=_read(spec.data.train), test=_read(spec.data.test), tokenizer=tokenizer)
    for name, split in (("train", data.train), ("test", data.test)):
        _check(name, split)
    if not all(isinstance(name, str) for name in data.classes):
        raise DataError(f"data: classes must be names, as text, not {shown(data.classes)}")
    return data


def _path(uri: str) -> Path:
    # A path in a spec is relative to the user's code, which may differ from the step's current folder.
    return storage.fetch(uri if storage.is_remote(uri) else str(Home.from_environment().code / uri))


def _read_text(uri: str) -> str:
    try:
        return _path(uri).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{uri}: cannot be read: {error}") from error


def _read(uri: str) -> Split:
    path = _path(uri)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Split(arrays["inputs"], arrays["labels"])
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        # NumPy's own error suggests allowing pickles, which run code.
        reason = "it holds Python objects" if "pickle" in str(error) else str(error)
        raise DataError(f"{uri}: not an .npz file with arrays `inputs` and `labels`: {reason}") from error


def _check(name: str, split: Split) -> None:
    if not isinstance(split, Split):
        raise DataError(f"data: split {name} is a {type(split).__name__}, not a slipstream.Split")
    for what, array in (("inputs", split.inputs), ("labels", split.labels)):
        if not isinstance(array, np.ndarray) or array.ndim == 0:
            raise DataError(
                f"data: {what} of split {name} are a {type(array).__name__}, not a NumPy array with a row for each "
                "sample"
            )
    if len(split) == 0:
        raise DataError(f"data: split {name} is empty")
    if len(split.inputs) != len(split.labels):
        raise DataError(f"data: split {name} has {len(split.inputs)} inputs but {len(split.labels)} labels")
    if str(split.inputs.dtype) not in INPUT_DTYPES:
        raise DataError(
            f"data: inputs of split {name} are {split.inputs.dtype}, which not every engine takes; give one of "
            f"{', '.join(INPUT_DTYPES)}, such as inputs.astype('{INPUT_DTYPES[0]}')"
        )
    if not any(np.issubdtype(split.labels.dtype, kind) for kind in (np.integer, np.floating)):
        raise DataError(f"data: labels of split {name} must be numbers, not {split.labels.dtype}")
    for what, array in (("inputs", split.inputs), ("labels", split.labels)):
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise DataError(f"data: {what} of split {name} hold NaN or infinity")
