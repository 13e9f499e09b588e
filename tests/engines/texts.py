"""Short made-up reviews for tests of text: which of two words is in one decides its class."""

import json

import numpy as np

from slipstream.data.splits import Data, Split

LENGTH = 12
WORDS = ("[PAD]", "[UNK]", "good", "bad", "a", "the", "film", "plot", "was", "and", "very", "long", "with", "music")
VOCABULARY = {word: number for number, word in enumerate(WORDS)}


def document(vocabulary: dict[str, int] = VOCABULARY) -> str:
    """The JSON of a tokenizer that splits at spaces."""
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    return json.dumps(
        {"version": "1.0", "added_tokens": [], **parts, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    )


def samples(n: int, seed: int = 1, length: int = LENGTH) -> Split:
    """Texts of 2 to `length` words, each with `good` (class 1) or `bad` (class 0) somewhere, as (n, length) ids."""
    rng = np.random.default_rng(seed)
    ids, labels = np.zeros((n, length), np.int64), rng.integers(0, 2, n)
    for row, label in zip(ids, labels, strict=True):
        words = int(rng.integers(2, length + 1))
        row[:words] = rng.integers(4, len(WORDS), words)
        row[rng.integers(words)] = VOCABULARY["good" if label else "bad"]
    return Split(ids, labels)


def data(training: int = 200, testing: int = 40, tokenizer: bool = True) -> Data:
    """A data set, as a spec names it."""
    return Data(samples(training, 3), samples(testing, 4), ("bad", "good"), document() if tokenizer else None)
