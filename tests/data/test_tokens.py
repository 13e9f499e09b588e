"""Token ids as arrays (with Hypothesis), and the tokenizer that makes them of texts."""

import json

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tests.engines.texts import VOCABULARY, WORDS, document

from slipstream.data import tokens
from slipstream.errors import DataError

BATCHES = arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(0, 3))


@given(BATCHES)
def test_trimming_cuts_nothing_but_common_padding(batch: npt.NDArray[np.int64]) -> None:
    trimmed = tokens.trim(batch)
    assert trimmed.shape[1] == tokens.length(batch) == max(int(tokens.lengths(batch).max()), 1)
    assert not batch[:, trimmed.shape[1] :].any()
    np.testing.assert_array_equal(trimmed, batch[:, : trimmed.shape[1]])
    assert trimmed.shape[1] == 1 or trimmed[:, -1].any()


def test_what_is_no_batch_of_ids_is_left_alone() -> None:
    for batch in (np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int32), np.zeros((2, 3, 4), np.int64)):
        assert tokens.trim(batch) is batch
        assert tokens.sample_shape(batch) == batch.shape[1:]
    assert tokens.sample_shape(np.zeros((2, 3), np.int64)) == (-1,)


@settings(max_examples=30)
@given(st.integers(1, 500), st.integers(1, 40), st.integers(0, 2**31))
def test_an_epoch_by_length_has_every_sample_once(samples: int, batch_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 64, samples)
    order = tokens.alike(rng.permutation(samples), lengths, min(batch_size, samples), rng)
    np.testing.assert_array_equal(np.sort(order), np.arange(samples))


def test_batches_of_like_length_are_hardly_padded() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 1600)
    order = rng.permutation(1600)

    def padded(indices: npt.NDArray[np.intp]) -> int:
        return sum(int(lengths[b].max()) * len(b) for b in np.split(indices, 50))

    by_length = tokens.alike(order, lengths, 32, rng)
    assert padded(order) > 1.8 * lengths.sum()
    assert padded(by_length) < 1.2 * lengths.sum()


def test_texts_are_cut_and_padded_to_the_longest_of_the_batch() -> None:
    tokenizer = tokens.Tokenizer(tokens.Tokenizer(document()).limited(4))
    assert tokenizer.size == len(WORDS)
    good, film = VOCABULARY["good"], VOCABULARY["film"]
    np.testing.assert_array_equal(tokenizer.encode(["good film", "film"]), [[good, film], [film, 0]])
    np.testing.assert_array_equal(tokenizer.encode(["film " * 9]), [[film] * 4])
    np.testing.assert_array_equal(tokenizer.encode(["", ""]), [[0], [0]])
    np.testing.assert_array_equal(tokenizer.encode(["schön"]), [[VOCABULARY["[UNK]"]]])
    assert tokenizer.encode(["film"]).dtype == np.int64
    assert tokenizer.decode(tokenizer.encode(["a good film", "film"])[1]) == "film"


def padded_with(number: int) -> str:
    told = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": number}
    return json.dumps({**json.loads(document()), "padding": {**told, "pad_type_id": 0, "pad_token": "[PAD]"}})


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("{}", "not the JSON of a Hugging Face tokenizer"),
        (document({"[UNK]": 0, "[PAD]": 1, "film": 2}), r"must be 0.*\[PAD\] is 1"),
        (document({"[UNK]": 0, "film": 1}), "must be 0.*it has none"),
        (padded_with(3), r"must be 0.*\[PAD\] is 3"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(broken: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"data\.tokenizer: .*{said}"):
        tokens.Tokenizer(broken)


def test_ids_and_tokenizer_must_go_together() -> None:
    ids = np.array([[2, 3, 0]], np.int64)
    tokens.require_consistent(document(), ids, ids)
    tokens.require_consistent(None, ids, ids)
    tokens.require_consistent(None, np.zeros((1, 3, 3), np.float32))
    with pytest.raises(DataError, match=rf"token id {len(WORDS)}, but the tokenizer's go from 0 to {len(WORDS) - 1}"):
        tokens.require_consistent(document(), ids, ids * 0 + len(WORDS))
    with pytest.raises(DataError, match="token id -3"):
        tokens.require_consistent(None, ids, ids - 3)
    with pytest.raises(DataError, match=r"must be token ids, \(N, T\) int64"):
        tokens.require_consistent(document(), ids.astype(np.float32))
