"""Whether an exported ONNX file gives the PyTorch network's answers, and if not, which module diverges first.

The exporter names a node after the modules that it came from, so a module's output is the tensor of the last node in
its scope. Batch norm is folded into the convolution before it; the ONNX then has one tensor for both.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from slipstream.contract.arrays import Array
from slipstream.data import tokens
from slipstream.errors import ModelError
from slipstream.frameworks import torch_training
from slipstream.onnx.agreement.bounds import EXACT, explain_mismatch
from slipstream.onnx.agreement.reference import reference, tensors

Outputs = list[tuple[str, torch.nn.Module, Array]]
"""Name, module and output of each module, in the order in which they finished: parts before the whole."""


def require(network: torch.nn.Module, path: Path, inputs: Array) -> None:
    """Raise ModelError, naming the first module that diverges, unless the ONNX file gives the same answers to
    `inputs`."""
    # What was frozen at export for one batch size or length shows only with another.
    for samples in (inputs, inputs[:1], tokens.trim(inputs[:1])):
        eager = torch_training.logits(network, samples)
        problem = explain_mismatch(eager, reference(path, samples), EXACT)
        if problem is not None:
            raise ModelError(
                f"{path.name}: ONNX Runtime and PyTorch differ on {len(samples)} real samples: it {problem}; the "
                "network does something that the export to ONNX does not carry, such as Python control flow on values; "
                f"{first_departure(network, path, tokens.trim(samples))}"
            )


def first_departure(network: torch.nn.Module, path: Path, samples: Array) -> str:
    """Return a sentence naming the first module whose output equals no tensor of its scope in the ONNX."""
    values = tensors(path, samples)
    outputs = module_outputs(network, samples)
    last = last_tensors(path)
    scopes = dict(_scopes(network))
    compared = 0
    for index, (name, module, output) in enumerate(outputs):
        value = values.get(last.get(scopes[name], ""))
        if value is None:
            continue
        compared += 1
        after = outputs[index + 1] if index + 1 < len(outputs) else None
        folded = after is not None and isinstance(after[1], torch.nn.modules.batchnorm._BatchNorm)
        problem = explain_mismatch(output, value, EXACT)
        if problem is not None and not (folded and after and explain_mismatch(after[2], value, EXACT) is None):
            kind = type(module).__name__
            return f"the first to depart is {f'module {name!r} ({kind})' if name else f'{kind}.forward itself'}"
    return f"none of the {compared} modules that have a tensor of their own in the ONNX departs"


def module_outputs(network: torch.nn.Module, samples: Array) -> Outputs:
    """Return outputs of the modules that are called once and answer one tensor, for samples (N, …)."""
    outputs: Outputs = []

    def record(name: str) -> Callable[[torch.nn.Module, object, object], None]:
        def hook(module: torch.nn.Module, _: object, output: object) -> None:
            if isinstance(output, torch.Tensor):
                outputs.append((name, module, output.detach().float().numpy()))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in network.named_modules()]
    try:
        torch_training.logits(network, samples)
    finally:
        for handle in handles:
            handle.remove()
    names = [name for name, _, _ in outputs]
    return [entry for entry in outputs if names.count(entry[0]) == 1]


def last_tensors(path: Path) -> dict[str, str]:
    """Return the last node's first output by scope, such as `/layer1/layer1.0/conv1`; the network's own scope is ``."""
    import onnx

    by_scope: dict[str, str] = {}
    for node in onnx.load(path).graph.node:
        scope = node.name.rpartition("/")[0]
        while scope:
            by_scope[scope] = node.output[0]
            scope = scope.rpartition("/")[0]
        by_scope[""] = node.output[0]
    return by_scope


def _scopes(network: torch.nn.Module, name: str = "", scope: str = "", label: str = "") -> Iterator[tuple[str, str]]:
    """Yield the exporter's scope in the ONNX by PyTorch's module name.

    A child of a sequence or a list is called after both (`layer1.0`); a list is not a scope.
    """
    yield name, scope
    numbered = isinstance(network, torch.nn.Sequential | torch.nn.ModuleList)
    base = scope.rpartition("/")[0] if isinstance(network, torch.nn.ModuleList | torch.nn.ModuleDict) else scope
    for child_name, child in network.named_children():
        called = f"{label}.{child_name}" if numbered and label else child_name
        whole = f"{name}.{child_name}" if name else child_name
        yield from _scopes(child, whole, f"{base}/{called}", called)
