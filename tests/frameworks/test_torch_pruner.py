"""What can be removed from networks of each kind, and what is refused before anything is trained."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.engines.text_networks import INNER, WIDTH, encoder, transformer
from tests.engines.texts import data
from torch import nn

from slipstream.errors import ModelError
from slipstream.frameworks import torch_pruner
from slipstream.frameworks.torch import FRAMEWORK
from slipstream.spec import Call, Prune

torch.set_num_threads(1)
HALF = Prune(sparsity=(0.5, 0.5), rounds=1, epochs=1, round_to=4)
ATTENTION = {f"blocks.{n}.{name}": WIDTH for n in range(2) for name in ("query", "key", "value")}
FEED_FORWARD = {f"blocks.{n}.widen": INNER // 2 for n in range(2)}


def call(**params: bool) -> Call:
    return Call(function="tests.engines.text_networks:transformer", params=params)


def saved(folder: Path, **params: bool) -> Path:
    FRAMEWORK.save(FRAMEWORK.build(call(**params), 0), call(**params), data().test, folder)
    return folder


@pytest.mark.parametrize("fixed", [False, True])
def test_of_a_transformer_all_but_the_heads_is_cut(tmp_path: Path, fixed: bool) -> None:
    """Where the code repeats the width of the states as a number, the feed-forward part alone."""
    pruner = FRAMEWORK.pruner(saved(tmp_path / "whole", fixed=fixed))
    before, inputs = pruner.figures(), data().test.inputs
    pruner.prune(0.5, round_to=4)
    left = torch_pruner.widths(pruner.network, torch_pruner.sample_of((-1,), "int64"))
    states = WIDTH if fixed else WIDTH // 2
    expected = ATTENTION | FEED_FORWARD | {f"blocks.{n}.{name}": states for n in range(2) for name in ("mix", "narrow")}
    assert left == expected
    after = pruner.figures()
    assert 0 < after["sparsity"] < 0.5 and after["macs"] < before["macs"] and after["parameters"] < before["parameters"]
    assert pruner.network.words.weight.shape[1] == states
    manifest = pruner.save(tmp_path / "pruned", data().test)
    assert manifest.sparsity == after["sparsity"]
    answers = FRAMEWORK.logits(FRAMEWORK.load(tmp_path / "pruned"), inputs)
    assert answers.shape == (len(inputs), 2)
    np.testing.assert_array_equal(answers, FRAMEWORK.logits(pruner.network, inputs))


def test_a_pruned_transformer_can_be_pruned_again(tmp_path: Path) -> None:
    pruner = FRAMEWORK.pruner(saved(tmp_path / "whole"))
    pruner.prune(0.25, round_to=4)
    pruner.save(tmp_path / "once", data().test)
    again = FRAMEWORK.pruner(tmp_path / "once")
    again.prune(1 / 3, round_to=4)  # of what is left: half of the whole
    again.save(tmp_path / "twice", data().test)
    whole = torch_pruner.widths(FRAMEWORK.load(tmp_path / "twice"), torch_pruner.sample_of((-1,), "int64"))
    assert FEED_FORWARD.items() <= whole.items()


def test_a_transformer_of_pytorch_keeps_its_attention(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0)
    network = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(64, 2))
    pruner = torch_pruner.ChannelPruner(network, torch_pruner.sample_of((4, 16), "float32"), {}, [])
    pruner.prune(0.5, round_to=4)
    assert network[0].layers[0].linear1.out_features == 16
    assert network[0].layers[0].self_attn.embed_dim == 16
    assert network(torch.randn(3, 4, 16)).shape == (3, 2)


def test_what_cannot_be_pruned_is_refused_and_left_as_it_is() -> None:
    network = encoder().eval()
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ModelError, match=r"no channel can be removed .* belong to attention"):
        FRAMEWORK.require_prunable(network, data().train, HALF)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    prunable = transformer()
    FRAMEWORK.require_prunable(prunable, data().train, HALF)
    assert prunable.blocks[0].widen.out_features == INNER


def test_a_network_that_cannot_be_traced_is_an_input_error() -> None:
    class Odd(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("not with these")

    with pytest.raises(ModelError, match=r"cannot trace Odd .* not with these"):
        FRAMEWORK.require_prunable(Odd(), data().train, HALF)
