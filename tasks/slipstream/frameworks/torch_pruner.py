"""Structured channel pruning with torch-pruning's dependency graph (Fang et al. 2023)."""

import json
from pathlib import Path
from typing import Any

import torch
import torch_pruning

from slipstream.errors import ModelError

HISTORY = "pruning.json"
PRUNABLE = (torch.nn.Conv2d, torch.nn.Linear)
Removal = list[Any]
"""[module name, whether output channels, indices]: one entry of torch-pruning's history."""


class ChannelPruner:
    """Removes whole channels, in every layer alike, those of the least magnitude first.

    A layer's width goes to the multiple of `round_to` that is nearest to its share; torch-pruning's own rounding
    goes down, which makes 8 of 16 channels from a sparsity of 0.1. Ranking within each group of coupled layers
    keeps the widths what the spec says.
    """

    def __init__(
        self, network: Any, input_shape: tuple[int, ...], whole: dict[str, int], history: list[Removal]
    ) -> None:
        self.network = network
        self._sample = torch.zeros(2, *input_shape)
        self._whole = whole
        self._start = widths(network, input_shape)
        self._history = list(history)
        self._importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)

    @property
    def history(self) -> list[Removal]:
        """All removals since the whole architecture."""
        return self._history

    def prune(self, sparsity: float, round_to: int) -> None:
        """Remove channels until the share `sparsity` of those at the start is gone. The outputs keep theirs."""
        graph = _graph(self.network, self._sample)
        names = {module: name for name, module in self.network.named_modules()}
        outputs = _output_layers(graph)
        for root in [group[0].dep.target.module for group in _groups(graph, outputs)]:
            name = names[root]
            width = int(graph.get_out_channels(root))
            remove = width - _target(self._start[name], sparsity, round_to)
            if remove <= 0:
                continue
            pruning = graph.get_pruner_of_module(root).prune_out_channels
            importance = self._importance(graph.get_pruning_group(root, pruning, list(range(width))))
            indices = sorted(torch.argsort(importance, stable=True)[:remove].tolist())
            group = graph.get_pruning_group(root, pruning, indices)
            if graph.check_pruning_group(group):
                group.prune()
        self._history += graph.pruning_history()

    def figures(self) -> dict[str, float]:
        """`sparsity` (share of the architecture's channels that is gone), `macs` of one sample, `parameters`."""
        left = widths(self.network, tuple(self._sample.shape[1:]))
        macs, parameters = torch_pruning.utils.count_ops_and_params(self.network, self._sample[:1])
        return {
            "sparsity": 1 - sum(left.values()) / max(sum(self._whole.values()), 1),
            "macs": float(macs),
            "parameters": float(parameters),
        }


def widths(network: Any, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Output channels of each convolution and linear layer but the last ones, whose channels are the classes."""
    outputs = _output_layers(_graph(network, torch.zeros(2, *input_shape)))
    return {
        name: int(module.weight.shape[0])
        for name, module in network.named_modules()
        if isinstance(module, PRUNABLE) and module not in outputs
    }


def replay(network: Any, candidate: Path, input_shape: tuple[int, ...]) -> None:
    """Remove from a whole network what was removed from the candidate's."""
    history = read_history(candidate)
    if not history:
        return
    try:
        _graph(network, torch.zeros(2, *input_shape)).load_pruning_history(history)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ModelError(
            f"{candidate / HISTORY}: does not fit the architecture ({error}); the architecture function has "
            "changed since the candidate was made"
        ) from error


def read_history(candidate: Path) -> list[Removal]:
    """What was removed from a candidate; empty when it is whole. Raises ModelError."""
    path = candidate / HISTORY
    if not path.exists():
        return []
    try:
        history: list[Removal] = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path}: not a pruning history: {error}") from error
    return history


def write_history(candidate: Path, history: list[Removal]) -> None:
    """Store what was removed beside the weights."""
    (candidate / HISTORY).write_text(json.dumps(history))


def _target(start: int, sparsity: float, round_to: int) -> int:
    """Width to keep of `start`: nearest multiple of `round_to`, at least one of it, never more than there is."""
    nearest = round(start * (1 - sparsity) / round_to) * round_to
    return min(max(nearest, round_to), start)


def _graph(network: Any, sample: Any) -> Any:
    network.eval()
    return torch_pruning.DependencyGraph().build_dependency(network, example_inputs=sample)


def _groups(graph: Any, ignored: list[Any]) -> list[Any]:
    groups = graph.get_all_groups(ignored_layers=ignored, root_module_types=list(PRUNABLE))
    return [g for g in groups if not _is_grouped(g)]


def _output_layers(graph: Any) -> list[Any]:
    """Layers whose channels reach the network's output without another layer between: the classifier."""
    pending, found = [node for node in graph.module2node.values() if not node.outputs], []
    while pending:
        node = pending.pop()
        if isinstance(node.module, PRUNABLE):
            found.append(node.module)
        else:
            pending += node.inputs
    return found


def _is_grouped(group: Any) -> bool:
    """Whether a grouped convolution (but not a depthwise one) takes part: its groups would have to stay equal."""
    modules = [dep.target.module for dep, _ in group]
    return any(isinstance(m, torch.nn.Conv2d) and m.groups not in (1, m.out_channels) for m in modules)
