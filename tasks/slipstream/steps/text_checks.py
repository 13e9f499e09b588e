"""Checks of text data in the step `check`: do ids, tokenizer, lengths, recipes and networks fit together?"""

from collections.abc import Iterator

import numpy as np

from slipstream.contract.arrays import Array
from slipstream.data import tokens
from slipstream.data.splits import Data
from slipstream.engines.lengths import require_varying
from slipstream.errors import DataError, EngineError, ModelError, SlipstreamError, SpecError
from slipstream.frameworks.base import Framework, Network
from slipstream.spec import Spec

TOLERANCE = 1e-3
"""Largest difference that padding may cause, as a share of the largest output."""


def data(spec: Spec, loaded: Data) -> Iterator[SlipstreamError]:
    """Yield what is wrong with token ids, the tokenizer, and the spec's use of them."""
    inputs = (loaded.train.inputs, loaded.test.inputs)
    try:
        tokens.require_consistent(loaded.tokenizer, *inputs)
    except DataError as error:
        yield error
    train_inputs = inputs[0]
    for name, target in spec.targets.items():
        try:
            require_varying(target.lengths, tokens.sample_shape(train_inputs), str(train_inputs.dtype))
        except EngineError as error:
            yield EngineError(f"targets.{name}.lengths: {error}")
            continue
        longest = max(map(tokens.length, inputs)) if target.lengths else 0
        if target.lengths and longest > target.lengths[-1]:
            yield EngineError(
                f"targets.{name}.lengths: the data has texts of {longest} tokens, but the greatest length is "
                f"{target.lengths[-1]}; add a greater one, or cut the texts"
            )
    pruned = [recipe for recipe in spec.recipes if "prune" in spec.techniques(recipe)]
    if pruned and tokens.is_token_ids(train_inputs):
        yield SpecError(
            f"recipes.{pruned[0]}: channels of networks on token ids cannot be pruned; distil to fewer layers instead"
        )


def network(framework: Framework, what: str, made: Network, loaded: Data) -> Iterator[ModelError]:
    """Yield problems of a network with the highest token id, and with padding."""
    if not tokens.is_token_ids(loaded.train.inputs):
        return
    problems = list(token_ids(framework, what, made, loaded))
    yield from problems
    if problems:
        return
    difference = padding_matters(framework, made, loaded.train.inputs)
    if difference > TOLERANCE:
        yield ModelError(
            f"{what} answers differently (by {difference:.2g} of the largest output) when a text is padded with zeros; "
            "leave out what is 0 from attention and pooling"
        )


def token_ids(framework: Framework, what: str, made: Network, loaded: Data) -> Iterator[ModelError]:
    """Yield a token id of the data or of the tokenizer for which the network has no embedding."""
    if not tokens.is_token_ids(loaded.train.inputs):
        return
    highest = {"the data": int(max(loaded.train.inputs.max(), loaded.test.inputs.max()))}
    if loaded.tokenizer is not None:
        highest["the tokenizer"] = tokens.Tokenizer(loaded.tokenizer).size - 1
    for whose, number in highest.items():
        try:
            framework.logits(made, np.array([[number, number]], np.int64))
        except Exception as error:  # each framework raises its own error for a missing row of an embedding
            yield ModelError(
                f"{what} does not take token id {number}, the highest of {whose} ({type(error).__name__}: {error}); "
                "give its embedding a row for each id"
            )
            return


def padding_matters(framework: Framework, made: Network, inputs: Array) -> float:
    """Return the largest change of a short text's answers when batched with a long one, as a share of the largest."""
    by_length = np.argsort(tokens.lengths(inputs[:1000]), kind="stable")
    short, beside = inputs[by_length[:1]], inputs[by_length[[0, -1]]]
    alone, padded = framework.logits(made, tokens.trim(short)), framework.logits(made, beside)[:1]
    return float(np.abs(alone - padded).max() / max(float(np.abs(padded).max()), 1e-6))
