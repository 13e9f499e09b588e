"""Structured channel pruning with torch-pruning's dependency graph (Fang et al. 2023)."""

import copy
import json
import logging
from collections.abc import Collection
from pathlib import Path

import torch
import torch_pruning

from slipstream.errors import ModelError

log = logging.getLogger(__name__)

HISTORY = "pruning.json"
TOKENS = 16
"""Length of the sample for a network that accepts any length."""
ATTENTION = ("Bmm", "Softmax", "ScaledDotProduct")
"""Parts of the names of autograd's operations in attention."""
PRUNABLE = (torch.nn.Conv2d, torch.nn.Linear)
Removal = list[str | bool | list[int]]
"""[module name, whether output channels, indices]: one entry of torch-pruning's history."""


class ChannelPruner:
    """Removes whole channels, in every layer alike, those of smallest magnitude first.

    A layer's width becomes the multiple of `round_to` that is nearest to its share; torch-pruning's own rounding goes
    down, which leaves 8 of 16 channels for a sparsity of 0.1. Ranking within each group of coupled layers keeps the
    widths that the spec requests.

    Unchanged are the layers before attention's softmax and products, since removing a channel would move the others
    into another head; and layers whose width is a constant in the network's code, unless the others need them to shrink
    too.
    """

    def __init__(
        self, network: torch.nn.Module, sample: torch.Tensor, whole: dict[str, int], history: list[Removal]
    ) -> None:
        self.network = network
        self._sample = sample
        self._whole = whole
        self._start = widths(network, sample)
        self._history = list(history)
        self._roots: list[str] | None = None

    @property
    def history(self) -> list[Removal]:
        """All removals since the original architecture."""
        return self._history

    def prune(self, sparsity: float, round_to: int) -> None:
        """Remove channels until the share `sparsity` of the original ones is gone. The outputs keep theirs.

        Raise ModelError if the network cannot be traced, or does not run with fewer channels.
        """
        targets = {name: _target(width, sparsity, round_to) for name, width in self._start.items()}
        if self._roots is None:
            self._roots = _roots(self.network, self._sample, targets)
        self._history += _cut(self.network, self._sample, self._roots, targets)
        if (problem := _problem(self.network, self._sample)) is not None:
            raise ModelError(f"prune: the network does not run with a sparsity of {sparsity:.3g}: {problem}")

    def figures(self) -> dict[str, float]:
        """Return `sparsity` (share of the architecture's channels removed), `macs` of one sample, `parameters`.

        A sample is a text of 16 tokens if the network accepts any length.
        """
        remaining = widths(self.network, self._sample)
        macs, parameters = torch_pruning.utils.count_ops_and_params(self.network, self._sample[:1])
        return {
            "sparsity": 1 - sum(remaining.values()) / max(sum(self._whole.values()), 1),
            "macs": float(macs),
            "parameters": float(parameters),
        }


def sample_of(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Return two samples to trace a network with, (2, …) in the data's dtype; `shape` is of one, with -1 where it
    varies.

    Whole numbers are ones: a valid token id or category in every network, while 0 would be only padding.
    """
    sizes = [TOKENS if size == -1 else size for size in shape]
    kind = getattr(torch, dtype)
    return torch.zeros(2, *sizes, dtype=kind) if kind.is_floating_point else torch.ones(2, *sizes, dtype=kind)


def require_prunable(network: torch.nn.Module, sample: torch.Tensor, sparsity: float, round_to: int) -> None:
    """Raise ModelError unless channels can be removed from the network, which is unchanged."""
    tried = ChannelPruner(copy.deepcopy(network), sample, {}, [])
    tried.prune(sparsity, round_to)
    if not tried.history:
        raise ModelError(
            f"prune: no channel can be removed at sparsity {sparsity} with widths in multiples of {round_to}: the "
            "layers are narrower, belong to attention, or have widths that the network's code repeats as numbers; "
            "leave `prune` out of the recipes, or lower prune.round_to"
        )


def widths(network: torch.nn.Module, sample: torch.Tensor) -> dict[str, int]:
    """Return output channels of each convolution and linear layer except the last ones, whose channels are the
    classes."""
    outputs = _output_layers(_graph(network, sample))
    return {
        name: int(module.weight.shape[0])
        for name, module in network.named_modules()
        if isinstance(module, PRUNABLE) and module not in outputs
    }


def replay(network: torch.nn.Module, candidate: Path, sample: torch.Tensor) -> None:
    """Remove from an original network what was removed from the candidate's."""
    history = read_history(candidate)
    if not history:
        return
    try:
        _graph(network, sample).load_pruning_history(history)
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ModelError(
            f"{candidate / HISTORY}: does not fit the architecture ({error}); the architecture function has "
            "changed since the candidate was made"
        ) from error


def read_history(candidate: Path) -> list[Removal]:
    """Return what was removed from a candidate; empty if nothing was. Raise ModelError."""
    path = candidate / HISTORY
    if not path.exists():
        return []
    try:
        history: list[Removal] = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path}: not a pruning history: {error}") from error
    return history


def write_history(candidate: Path, history: list[Removal]) -> None:
    """Store what was removed, next to the weights."""
    (candidate / HISTORY).write_text(json.dumps(history))


def _target(start: int, sparsity: float, round_to: int) -> int:
    """Return the width to keep of `start`: nearest multiple of `round_to`, at least one of it, never more than
    `start`."""
    nearest = round(start * (1 - sparsity) / round_to) * round_to
    return min(max(nearest, round_to), start)


def _roots(network: torch.nn.Module, sample: torch.Tensor, targets: dict[str, int]) -> list[str]:
    """Return the first layer of each group of coupled layers that can be cut to its target."""
    graph = _graph(network, sample)
    names = {module: name for name, module in network.named_modules()}
    groups = graph.get_all_groups(ignored_layers=_output_layers(graph), root_module_types=list(PRUNABLE))
    roots = [names[g[0].dep.target.module] for g in groups if not _is_grouped(g) and not _is_attention(g)]
    whole = sorted({names[g[0].dep.target.module] for g in groups} - set(roots))
    if not _runs_with(network, sample, roots, targets):
        fitting = [root for root in roots if _runs_with(network, sample, [root], targets)]
        whole += sorted(set(roots) - set(fitting))
        roots = fitting
    if whole:
        log.info("left whole, with the layers that are coupled to them: %s", ", ".join(whole))
    return roots


def _runs_with(network: torch.nn.Module, sample: torch.Tensor, roots: list[str], targets: dict[str, int]) -> bool:
    """Return whether the network still runs when these layers are cut."""
    tried = copy.deepcopy(network)
    _cut(tried, sample, roots, targets)
    return _problem(tried, sample) is None


def _cut(
    network: torch.nn.Module, sample: torch.Tensor, roots: Collection[str], targets: dict[str, int]
) -> list[Removal]:
    """Cut these layers, and those coupled to them, to their targets; return what was removed."""
    graph = _graph(network, sample)
    importance_of = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    for name in roots:
        root = network.get_submodule(name)
        width = int(graph.get_out_channels(root))
        remove = width - targets[name]
        if remove <= 0:
            continue
        pruning = graph.get_pruner_of_module(root).prune_out_channels
        importance = importance_of(graph.get_pruning_group(root, pruning, list(range(width))))
        indices = sorted(torch.argsort(importance, stable=True)[:remove].tolist())
        group = graph.get_pruning_group(root, pruning, indices)
        if graph.check_pruning_group(group):
            group.prune()
    removals: list[Removal] = graph.pruning_history()
    return removals


def _problem(network: torch.nn.Module, sample: torch.Tensor) -> str | None:
    """Return why the network does not run, or None if it does."""
    try:
        with torch.inference_mode():
            network(sample)
    except Exception as error:  # the user's network may raise anything
        return f"{type(error).__name__}: {error}"
    return None


def _graph(network: torch.nn.Module, sample: torch.Tensor) -> torch_pruning.DependencyGraph:
    network.eval()
    try:
        return torch_pruning.DependencyGraph().build_dependency(network, example_inputs=sample)
    except Exception as error:  # torch-pruning's own, or the user's network's
        raise ModelError(
            f"prune: torch-pruning cannot trace {type(network).__name__} on {tuple(sample.shape)} {sample.dtype}: "
            f"{type(error).__name__}: {error}; leave `prune` out of the recipes"
        ) from error


def _output_layers(graph: torch_pruning.DependencyGraph) -> list[torch.nn.Module]:
    """Return layers whose channels reach the network's output without another layer between: the classifier."""
    pending, layers = [node for node in graph.module2node.values() if not node.outputs], []
    while pending:
        node = pending.pop()
        if isinstance(node.module, PRUNABLE):
            layers.append(node.module)
        else:
            pending += node.inputs
    return layers


def _is_grouped(group: torch_pruning.Group) -> bool:
    """Return whether a grouped (but not depthwise) convolution takes part: its groups must stay equal."""
    modules = [dep.target.module for dep, _ in group]
    return any(isinstance(m, torch.nn.Conv2d) and m.groups not in (1, m.out_channels) for m in modules)


def _is_attention(group: torch_pruning.Group) -> bool:
    """Return whether products of activations or a softmax take part: their channels are heads, which must stay
    equal."""
    kinds = torch_pruning.ops.OPTYPE
    targets = [dep.target for dep, _ in group]
    return any(t.type == kinds.MHA or any(name in t.name for name in ATTENTION) for t in targets)
