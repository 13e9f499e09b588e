"""Which module departs between a PyTorch network and its ONNX file."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tests.frameworks.contract import squares
from torch import nn

from slipstream.errors import ModelError
from slipstream.frameworks import torch_agreement
from slipstream.frameworks.torch import FRAMEWORK, _export
from slipstream.spec import Call

torch.set_num_threads(1)
INPUTS = squares(8, 0).inputs


class Block(nn.Module):
    """A residual block; its sum is an operator of its own forward, not of a module in it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Network(nn.Module):
    """Modules in sequences, in a list and in a dictionary, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2)
        self.blocks = nn.ModuleList([Block(), nn.Sequential(Block(), nn.Tanh())])
        self.act = nn.ReLU()
        self.heads = nn.ModuleDict({"scores": nn.Linear(36, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.heads["scores"](self.act(x).flatten(1))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    made = Network()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return made.eval()


@pytest.fixture
def path(network: nn.Module, tmp_path: Path) -> Path:
    _export(network, INPUTS, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def damage(path: Path, node: str, weight: int = 1, by: float = 0.1) -> None:
    """Change a weight of a node in the file."""
    model = onnx.load(path)
    name = next(n for n in model.graph.node if n.name == node).input[weight]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.float32(by), name))
    onnx.save(model, path)


def test_a_true_export_agrees_and_every_scope_is_known(network, path):
    torch_agreement.require(network, path, INPUTS)
    scopes = dict(torch_agreement._scopes(network))
    exported = set(torch_agreement.last_tensors(path)) - {""}
    assert exported - {"/act_1"} <= set(scopes.values())
    assert "departs" in torch_agreement.first_departure(network, path, INPUTS)


@pytest.mark.parametrize(
    ("node", "module"),
    [
        ("/stem/Conv", r"module 'stem' \(Conv2d\)"),
        ("/blocks.0/body/body.0/Conv", r"module 'blocks\.0\.body\.0' \(Conv2d\)"),
        ("/blocks.1/blocks.1.0/body/body.3/Conv", r"module 'blocks\.1\.0\.body\.3' \(Conv2d\)"),
        ("/scores/Gemm", r"module 'heads\.scores' \(Linear\)"),
    ],
)
def test_the_module_whose_weights_were_lost_is_named(network, path, node, module):
    damage(path, node)
    with pytest.raises(ModelError, match=f"ONNX Runtime and PyTorch differ.*depart is {module}"):
        torch_agreement.require(network, path, INPUTS)


def test_an_operator_between_modules_is_blamed_on_the_forward_that_has_it(network, path):
    model = onnx.load(path)
    next(n for n in model.graph.node if n.name == "/blocks.0/Add").op_type = "Sub"
    onnx.save(model, path)
    with pytest.raises(ModelError, match=r"depart is module 'blocks\.0' \(Block\)"):
        torch_agreement.require(network, path, INPUTS)


def test_control_flow_on_values_is_blamed_on_the_network_itself(tmp_path, home):
    call = Call(function="tests.frameworks.networks:branches")
    with pytest.raises(ModelError, match=r"differ on 1 real samples.*depart is Branches\.forward itself"):
        FRAMEWORK.save(FRAMEWORK.build(call, 0), call, squares(8, 0), tmp_path / "candidate")
