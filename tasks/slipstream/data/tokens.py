"""Token ids: the form of text between a tokenizer and a network.

A batch of token ids is (N, T) int64: each row is one text, padded at its end with `PAD`. T may differ from batch to
batch, and the amount of padding must not change an answer: the network ignores `PAD`.
"""

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from slipstream.contract.arrays import Array
from slipstream.errors import DataError

PAD = 0
STRETCH = 16
"""Number of training batches within which texts are grouped by length."""
PADDING_NAMES = ("[PAD]", "<pad>", "<PAD>")
"""Names that tokenizers use for the padding token."""
TOKENIZER = "tokenizer.json"
"""The tokenizer's file in an engine folder."""


def is_token_ids(inputs: Array) -> bool:
    """Return whether inputs are token ids: (N, T) int64. Pass ids of fixed meaning and number as int32."""
    return inputs.ndim == 2 and inputs.dtype == np.int64


def sample_shape(inputs: Array) -> tuple[int, ...]:
    """Return the shape of one sample of inputs (N, …), as in manifests: -1 where it varies between batches."""
    return (-1,) if is_token_ids(inputs) else inputs.shape[1:]


def lengths(inputs: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
    """Return the (N,) length of each text in ids (N, T), without padding."""
    used = inputs != PAD
    return np.where(used.any(axis=1), inputs.shape[1] - used[:, ::-1].argmax(axis=1), 0).astype(np.intp)


def alike(
    order: npt.NDArray[np.intp], lengths: npt.NDArray[np.intp], batch_size: int, random: np.random.Generator
) -> npt.NDArray[np.intp]:
    """Return an epoch's order, changed so that the texts of a batch have similar lengths and need little padding.

    Texts are sorted only within stretches of `STRETCH` batches, and the batches are shuffled, so the order stays
    random.
    """
    batches = len(order) // batch_size
    whole, rest = np.split(order, [batches * batch_size])
    stretches = np.split(whole, range(STRETCH * batch_size, len(whole), STRETCH * batch_size))
    by_length = np.concatenate([s[np.argsort(lengths[s], kind="stable")] for s in stretches])
    shuffled = by_length.reshape(batches, batch_size)[random.permutation(batches)]
    return np.concatenate((shuffled.ravel(), rest))


def length(batch: npt.NDArray[np.int64]) -> int:
    """Return the length of the longest text in a batch (N, T), without padding; at least 1."""
    used = np.flatnonzero(batch.any(axis=0))
    return int(used[-1]) + 1 if len(used) else 1


def trim(batch: Array) -> Array:
    """Return the batch without trailing columns that are all padding; other inputs are unchanged."""
    return batch[:, : length(batch)] if is_token_ids(batch) else batch


class Tokenizer:
    """A tokenizer of the package `tokenizers`, from its JSON."""

    def __init__(self, document: str) -> None:
        """Raise DataError if the document is not a tokenizer, or its padding is not `PAD`."""
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would take cores from the engine
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(document)
        except Exception as error:  # the package raises nothing more specific
            raise DataError(f"data.tokenizer: not the JSON of a Hugging Face tokenizer: {error}") from error
        self._padding = self._find_padding()

    def _find_padding(self) -> str:
        padding = self._tokenizer.padding
        names = [padding["pad_token"]] if padding else PADDING_NAMES
        ids = {name: number for name in names if (number := self._tokenizer.token_to_id(name)) is not None}
        if padding:
            ids[padding["pad_token"]] = padding["pad_id"]
        for name, number in ids.items():
            if number == PAD:
                return name
        what = ", ".join(f"{name} is {number}" for name, number in ids.items()) or "it has none"
        raise DataError(
            f"data.tokenizer: the padding token's id must be {PAD}, which is what batches are padded with ({what}); "
            "give the tokenizer another vocabulary order, or shift ids and embedding by one"
        )

    @property
    def size(self) -> int:
        """Number of ids: one more than the highest possible id."""
        highest = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        return int(highest) + 1

    def limited(self, tokens: int) -> str:
        """Return the tokenizer's JSON, set to cut texts at that many tokens and pad them to the longest of a batch."""
        self._tokenizer.enable_truncation(tokens)
        self._tokenizer.enable_padding(direction="right", pad_id=PAD, pad_token=self._padding)
        return str(self._tokenizer.to_str())

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the (N, T) ids of N texts, for a tokenizer that `limited` wrote. T is at least 1."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        batch = np.array(rows, np.int64)
        return batch if batch.shape[1] else np.full((len(rows), 1), PAD, np.int64)

    def decode(self, ids: npt.NDArray[np.int64]) -> str:
        """Return a text with approximately these ids (T,): a tokenizer forgets capitals and spaces."""
        return str(self._tokenizer.decode(ids[ids != PAD].tolist()))


def require_consistent(document: str | None, *inputs: Array) -> None:
    """Raise DataError unless a data set's token ids are valid, and its tokenizer, if any, can give such ids."""
    if not all(is_token_ids(ids) for ids in inputs):
        if document is not None:
            shapes = ", ".join(f"{ids.shape[1:]} {ids.dtype}" for ids in inputs)
            raise DataError(f"data.tokenizer: inputs must be token ids, (N, T) int64, not (N, …) of {shapes}")
        return
    for ids in inputs:
        if ids.size and int(ids.min()) < 0:
            raise DataError(f"data: inputs hold the token id {int(ids.min())}; ids start at 0, which is padding")
    if document is not None:
        size = Tokenizer(document).size
        for ids in inputs:
            if ids.size and int(ids.max()) >= size:
                raise DataError(
                    f"data.tokenizer: inputs hold the token id {int(ids.max())}, but the tokenizer's go from 0 to "
                    f"{size - 1}; they were made by another one"
                )
