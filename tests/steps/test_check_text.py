"""check: what it says of text that does not fit, on real networks."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from tests.engines.texts import LENGTH, WORDS, data, document

from slipstream.data.splits import Data
from slipstream.errors import SlipstreamError
from slipstream.frameworks.base import framework_for
from slipstream.spec import Call, Spec
from slipstream.steps import check, text_checks


def spec(**changes: object) -> Spec:
    written = {
        "name": "text",
        "model": {"registry": "models:/text@source", "architecture": "tests.engines.text_networks:encoder"},
        "data": "tests.engines.texts:data",
        "recipes": {"int8": ["quantize"]},
        "targets": {"server": {"engine": "openvino", "lengths": [8, LENGTH]}},
    }
    return Spec.model_validate({**written, **changes})


def said(problems: Iterable[SlipstreamError]) -> list[str]:
    return [str(problem) for problem in problems]


def network(loaded: Data, **params: int | bool) -> list[str]:
    """What is said of the small encoder, built with `params`."""
    framework = framework_for("torch")
    call = Call(function="tests.engines.text_networks:encoder", params=params)
    return said(text_checks.network(framework, "model.architecture: encoder", framework.build(call, 0), loaded))


def test_what_fits_is_not_mentioned() -> None:
    assert said(text_checks.data(spec(), data())) == []
    assert network(data()) == []
    assert network(data(tokenizer=False)) == []


def test_a_vocabulary_larger_than_the_embedding_is_named() -> None:
    larger = replace(data(), tokenizer=document({word: i for i, word in enumerate((*WORDS, "more", "words"))}))
    (problem,) = network(larger)
    assert f"does not take token id {len(WORDS) + 1}, the highest of the tokenizer" in problem
    assert problem.startswith("model.architecture: encoder")


def test_ids_beyond_the_embedding_are_named() -> None:
    (problem,) = network(data(), rows=8)
    assert "the highest of the data" in problem


def test_ids_that_the_tokenizer_cannot_have_made_are_named() -> None:
    smaller = replace(data(), tokenizer=document({word: i for i, word in enumerate(WORDS[:6])}))
    (problem,) = said(text_checks.data(spec(), smaller))
    assert problem.startswith("data.tokenizer: inputs hold the token id")


def test_a_network_that_does_not_leave_out_padding_is_named() -> None:
    (problem,) = network(data(), masks=False)
    assert "answers differently" in problem and "padded with zeros" in problem


def test_texts_longer_than_the_greatest_length_are_named_with_the_target() -> None:
    (problem,) = said(text_checks.data(spec(targets={"server": {"engine": "openvino", "lengths": [8]}}), data()))
    assert problem.startswith(f"targets.server.lengths: the data has texts of {LENGTH} tokens")


def test_lengths_without_text_are_named_with_the_target() -> None:
    images = replace(data(tokenizer=False).train, inputs=np.zeros((200, 3, 8), np.float32))
    (problem,) = said(text_checks.data(spec(), Data(images, images)))
    assert problem.startswith("targets.server.lengths: lengths are for models that take token ids")


def test_pruning_is_refused() -> None:
    (problem,) = said(text_checks.data(spec(recipes={"small": ["prune"]}), data()))
    assert problem.startswith("recipes.small: channels of networks on token ids cannot be pruned")


@pytest.mark.usefixtures("mlflow_server", "home")
def test_check_says_it_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.engines import texts
    from tests.steps.training import step

    from slipstream.errors import DataError

    monkeypatch.setattr(texts, "document", lambda: "{}")
    with pytest.raises(DataError, match=r"data\.tokenizer: not the JSON"):
        step("check", spec(model={**spec().model.model_dump(), "train": "tests.engines.text_networks:train"}))


@pytest.mark.usefixtures("mlflow_server", "home")
def test_check_names_the_token_id_when_not_even_a_batch_of_the_data_fits() -> None:
    from tests.steps.training import step

    from slipstream.errors import ModelError

    encoder = {"function": "tests.engines.text_networks:encoder", "params": {"rows": 3}}
    given = {**spec().model.model_dump(), "architecture": encoder, "train": "tests.engines.text_networks:train"}
    few = {"function": "tests.engines.texts:data", "params": {"training": 40, "testing": 20}}  # which share no sample
    with pytest.raises(
        ModelError, match=r"^model.architecture: .* does not take token id \d+, the highest of the data"
    ):
        step("check", spec(model=given, data=few, quantize={"samples": 16}, objective={"max_drop": 60.0}))


def test_a_network_that_cannot_be_pruned_is_named_before_training() -> None:
    framework = framework_for("torch")
    pruned = spec(recipes={"int8": ["quantize"], "small": ["prune", "quantize"]}, prune={"round_to": 4, "epochs": 1})
    attention_alone = framework.build(Call(function="tests.engines.text_networks:encoder"), 0)
    own = pruned.model.architecture
    (problem,) = said(check._pruning(pruned, "model.architecture", own, attention_alone, data()))
    assert problem.startswith("recipes.small: model.architecture: prune: no channel can be removed")
    assert said(check._pruning(spec(), "model.architecture", own, attention_alone, data())) == []
    prunable = framework.build(Call(function="tests.engines.text_networks:transformer"), 0)
    assert said(check._pruning(pruned, "model.architecture", own, prunable, data())) == []
