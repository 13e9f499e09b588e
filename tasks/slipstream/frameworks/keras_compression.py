"""Training under a constraint with tensorflow-model-optimization: sparse, clustered or quantized weights.

A network is wrapped, trained by keras_training.fit, and stripped again. The requested properties are then measured on
the result: the wrappers' own figures report only their intention. Later techniques preserve the results of earlier
ones: clustering and quantization-aware training keep zeros, the latter also the clusters (Arm's collaborative
optimization: https://www.tensorflow.org/model_optimization/guide/combine/collaborative_optimization).
"""

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_model_optimization as tfmot
from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster as cluster_api

from slipstream.contract.arrays import Array
from slipstream.data.splits import Split
from slipstream.errors import ModelError, SpecError
from slipstream.frameworks import keras_files
from slipstream.frameworks.base import MANIFEST, ONNX, CandidateManifest, Job, Schedule
from slipstream.frameworks.keras_files import compressible, kernels
from slipstream.frameworks.keras_runtime import keras
from slipstream.frameworks.keras_training import seed_everything, steps_per_epoch
from slipstream.spec import Cluster, Prune, Quantize

log = logging.getLogger(__name__)

SLACK = 0.005
"""Allowed shortfall of sparsity: weights of equal magnitude at the threshold are all kept."""
BLOCK, ZEROS = 4, 2
"""The pattern 2:4: of four weights along the input channels, two are zero."""


@dataclass
class Constrained:
    """See frameworks.base.Constrained."""

    network: keras.Model
    source: CandidateManifest
    strip: Callable[[keras.Model], keras.Model]
    require: Callable[[keras.Model], None]
    """Raises ModelError if the stripped network does not have the requested properties."""
    write: Callable[[keras.Model, Array, Path], None]
    section: Prune | Cluster | Quantize

    @property
    def is_sparse(self) -> bool:
        """Whether it was pruned, now or before."""
        return isinstance(self.section, Prune) or self.source.sparsity > 0

    @property
    def is_clustered(self) -> bool:
        """Whether its weights were clustered, now or before."""
        return isinstance(self.section, Cluster) or self.source.unique_weights > 0

    def finish(self) -> dict[str, float]:
        """Strip the network and measure the result. Raise ModelError if it does not have the requested properties."""
        self.network = self.strip(self.network)
        self.require(self.network)
        return measure(self.network, self.source.parameters)

    def save(self, folder: Path, samples: Split) -> CandidateManifest:
        """Write the stripped network as a candidate folder."""
        figures = measure(self.network, self.source.parameters)
        folder.mkdir(parents=True)
        self.write(self.network, samples.inputs[:8], folder)
        # Later techniques keep what the manifest names, so it names only what was requested.
        manifest = self.source.model_copy(
            update={
                "sparsity": figures["sparsity"] if self.is_sparse else 0.0,
                "unique_weights": int(figures["unique_weights"]) if self.is_clustered else 0,
            }
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2))
        return manifest


def constrain(
    network: keras.Model, source: CandidateManifest, section: Prune | Cluster | Quantize, job: Job, schedule: Schedule
) -> Constrained:
    """Return the network of the candidate `source`, ready to be trained as a section of the spec says.

    The network is changed. Raise ModelError if it has no suitable layer, SpecError if the training is too short.
    """
    seed_everything(job.seed)  # k-means++ draws its first centroids
    if isinstance(section, Prune):
        return sparse(network, source, section, steps_per_epoch(len(job.data.train), schedule, job.seed))
    if isinstance(section, Cluster):
        return clustered(network, source, section)
    assert isinstance(section, Quantize)
    return quantized(network, source, section)


def sparse(network: keras.Model, source: CandidateManifest, prune: Prune, steps: int) -> Constrained:
    """Constrain weights of smallest magnitude to zero: gradually (`magnitude`), or two of each four at once (`2:4`).

    `steps` are those of an epoch.
    """
    if prune.method == "magnitude" and steps * prune.epochs < prune.end_step:
        raise SpecError(
            f"prune.end_step is {prune.end_step}, but {prune.epochs} epochs of {steps} steps end before; train for "
            f"{math.ceil(prune.end_step / steps)} epochs or lower prune.end_step"
        )
    pattern = prune.method == "2:4"
    pruned = [name for name, kernel in kernels(network) if not pattern or _takes_pattern(kernel)]
    unpruned = [name for name, _ in kernels(network) if name not in pruned]
    if not pruned:
        raise ModelError(
            f"prune: no layer can be pruned {prune.method}: the network has "
            + (f"no convolution or dense layer with a multiple of {BLOCK} inputs" if pattern else "none with a kernel")
        )
    log.info(
        "pruning %d layers%s", len(pruned), f"; not {', '.join(unpruned)}: inputs come not in fours" if unpruned else ""
    )
    options: dict[str, object] = {"pruning_schedule": _decay(prune)}
    if pattern:
        options = {"pruning_schedule": tfmot.sparsity.keras.ConstantSparsity(ZEROS / BLOCK, begin_step=0)}
        options["sparsity_m_by_n"] = (ZEROS, BLOCK)

    def require(stripped: keras.Model) -> None:
        pruned_kernels = {name: kernel for name, kernel in kernels(stripped) if name in pruned}
        _require_pattern(pruned_kernels) if pattern else _require_sparsity(pruned_kernels, prune.sparsity[1])

    return Constrained(
        _wrap(network, lambda layer: layer.name in pruned, tfmot.sparsity.keras.prune_low_magnitude, options),
        source,
        tfmot.sparsity.keras.strip_pruning,
        require,
        keras_files.write,
        prune,
    )


def clustered(network: keras.Model, source: CandidateManifest, cluster: Cluster) -> Constrained:
    """Constrain each layer's weights to few distinct values, which are trained (Han et al. 2016).

    In a sparse network one of them is zero, and zeros stay where they are.
    """
    before = zeros(network)
    # With as many clusters as weights, there is nothing to share.
    chosen = [name for name, kernel in kernels(network) if kernel.size > cluster.clusters]
    if not chosen:
        raise ModelError(f"cluster: no layer has more than {cluster.clusters} weights; lower cluster.clusters")
    options = {
        "number_of_clusters": cluster.clusters,
        "cluster_centroids_init": tfmot.clustering.keras.CentroidInitialization.KMEANS_PLUS_PLUS,
        "preserve_sparsity": source.sparsity > 0,
    }

    def require(stripped: keras.Model) -> None:
        for name, kernel in kernels(stripped):
            if name in chosen and len(np.unique(kernel)) > cluster.clusters:
                count = len(np.unique(kernel))
                raise ModelError(f"cluster: layer {name} has {count} different weights, not {cluster.clusters}")
        _require_kept(before, zeros(stripped), source)

    wrapped = _wrap(network, lambda layer: layer.name in chosen, cluster_api.cluster_weights, options)
    return Constrained(wrapped, source, tfmot.clustering.keras.strip_clustering, require, keras_files.write, cluster)


def quantized(network: keras.Model, source: CandidateManifest, quantize: Quantize) -> Constrained:
    """Round weights and activations to INT8 in the forward pass (Jacob et al. 2018).

    The scheme also keeps zeros and clusters, if the candidate has them. INT8 has a scale for each output channel of a
    convolution, so clusters are trained by channel there: the whole layer may have more values than before, a channel
    never.
    """
    keep_zeros, keep_clusters = source.sparsity > 0, source.unique_weights > 0
    before, values = zeros(network), unique(network)
    combine = tfmot.experimental.combine
    if keep_clusters:
        scheme = combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=keep_zeros)
    elif keep_zeros:
        scheme = combine.Default8BitPrunePreserveQuantizeScheme()
    else:
        scheme = None
    try:
        annotated = tfmot.quantization.keras.quantize_annotate_model(network)
        with tfmot.quantization.keras.quantize_scope():
            wrapped = tfmot.quantization.keras.quantize_apply(annotated, *([scheme] if scheme is not None else []))
    except (ValueError, RuntimeError) as error:
        raise ModelError(
            f"quantize.epochs: the network cannot be trained for INT8: {error}; with epochs 0 it is quantized after "
            "training"
        ) from error

    def require(stripped: keras.Model) -> None:
        _require_kept(before, zeros(stripped), source)
        if keep_clusters and unique_by_channel(stripped) > values:
            count = unique_by_channel(stripped)
            raise ModelError(f"quantize: {count} different weights in a channel, but only {values} before")

    strip = combine.strip_clustering_cqat if keep_clusters else lambda trained: trained
    return Constrained(wrapped, source, strip, require, write_quantized, quantize)


def write_quantized(network: keras.Model, samples: Array, folder: Path) -> None:
    """Write `saved_model/` with the trained ranges, for LiteRT, and `model.onnx` with the trained weights only.

    tf2onnx writes Q/DQ nodes around activations, but rounds weights in place, which engines do not compute in INT8: the
    step `quantize` inserts both. Raise ModelError.
    """
    keras_files.require_finite(network)
    serve = keras_files.write_saved_model(network, samples, folder / keras_files.SAVED_MODEL)
    keras_files.write_onnx(serve, folder / ONNX)
    _drop_rounding(folder / ONNX)


def _drop_rounding(path: Path) -> None:
    """Remove QuantizeLinear and DequantizeLinear around activations from an ONNX file: values pass unchanged.

    A Transpose or Reshape may lie between the two; it then moves numbers instead of codes. Weights that are stored as
    codes keep their DequantizeLinear.
    """
    import onnx

    from slipstream.onnx import graph as onnx_graph

    model = onnx.load(path)
    passed: dict[str, str] = {}
    codes: set[str] = set()
    nodes = []
    for node in model.graph.node:  # in topological order
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] in codes):
            passed[node.output[0]] = passed.get(node.input[0], node.input[0])
            if node.op_type == "QuantizeLinear":
                codes.add(node.output[0])
            continue
        if codes.intersection(node.input):
            codes.update(node.output)
        for i, name in enumerate(node.input):
            node.input[i] = passed.get(name, name)
        nodes.append(node)
    answers = [output.name for output in model.graph.output if output.name in passed]
    nodes += [onnx.helper.make_node("Identity", [passed[name]], [name]) for name in answers]
    used = {name for node in nodes for name in node.input}
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in used]
    for field, values in (
        (model.graph.node, nodes),
        (model.graph.initializer, initializers),
        (model.graph.value_info, []),
    ):
        onnx_graph.replace(field, values)
    onnx.save(model, path)


def _wrap(
    network: keras.Model,
    chosen: Callable[[keras.layers.Layer], bool],
    wrapper: Callable[..., keras.layers.Layer],
    options: Mapping[str, object],
) -> keras.Model:
    """Return the network with some of its layers wrapped, also in nested networks."""

    def wrap(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.Model):
            return keras.models.clone_model(layer, clone_function=wrap)
        return wrapper(layer, **options) if compressible(layer) and chosen(layer) else layer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wrap(network)


def _decay(prune: Prune) -> tfmot.sparsity.keras.PruningSchedule:
    """Return the sparsity of Zhu and Gupta (2017), equation 1, over training steps."""
    first, last = prune.sparsity
    return tfmot.sparsity.keras.PolynomialDecay(
        first, last, prune.begin_step, prune.end_step, power=3, frequency=prune.frequency
    )


def measure(network: keras.Model, parameters: int) -> dict[str, float]:
    """Return `sparsity` (share of zeros in the weights of convolutions and dense layers), `unique_weights` (the largest
    number of distinct values in one of them), the same for one output channel, the candidate's `parameters`, and how
    many of them are not zero. The ranges that INT8 training adds are not parameters."""
    empty = zeros(network)
    total = sum(kernel.size for _, kernel in kernels(network))
    return {
        "sparsity": sum(empty.values()) / max(total, 1),
        "unique_weights": float(unique(network)),
        "unique_weights_per_channel": float(unique_by_channel(network)),
        "parameters": float(parameters),
        "nonzero_parameters": float(parameters - sum(empty.values())),
    }


def zeros(network: keras.Model) -> dict[str, int]:
    """Return the number of zero weights by layer."""
    return {name: int((kernel == 0).sum()) for name, kernel in kernels(network)}


def unique(network: keras.Model) -> int:
    """Return the largest number of distinct values in one layer's weights."""
    return max((len(np.unique(kernel)) for _, kernel in kernels(network)), default=0)


def unique_by_channel(network: keras.Model) -> int:
    """Return the largest number of distinct values in one output channel of a layer's weights."""
    channels = (kernel[..., c] for _, kernel in kernels(network) for c in range(kernel.shape[-1]))
    return max((len(np.unique(channel)) for channel in channels), default=0)


def _takes_pattern(kernel: Array) -> bool:
    return kernel.ndim in (2, 4) and kernel.shape[-2] % BLOCK == 0


def _require_sparsity(pruned: dict[str, Array], required: float) -> None:
    for name, kernel in pruned.items():
        # At least one weight is kept, and its rounding counts in small layers.
        least = min(required - SLACK, required - 1 / kernel.size)
        measured = float((kernel == 0).mean())
        if measured < least:
            raise ModelError(
                f"prune: layer {name} has {measured:.1%} zeros after stripping, not the {required:.1%} that "
                "prune.sparsity asks for"
            )


def _require_pattern(pruned: dict[str, Array]) -> None:
    for name, kernel in pruned.items():
        blocks = np.moveaxis(kernel, -2, -1).reshape(-1, BLOCK)
        full = int(((blocks == 0).sum(1) < ZEROS).sum())
        if full:
            raise ModelError(f"prune: {full} blocks of {BLOCK} weights in layer {name} have less than {ZEROS} zeros")


def _require_kept(before: dict[str, int], after: dict[str, int], source: CandidateManifest) -> None:
    """Raise ModelError if a sparse candidate has lost zeros."""
    lost = {name: before[name] - after.get(name, 0) for name in before if after.get(name, 0) < before[name]}
    if source.sparsity > 0 and lost:
        raise ModelError(f"zeros of the pruned weights were lost: {lost} by layer")
