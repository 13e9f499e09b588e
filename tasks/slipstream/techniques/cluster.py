"""cluster: each layer's weights are restricted to few distinct values, which are then trained (Han et al. 2016).

Pruned weights stay pruned. Metrics, measured on the resulting network: `unique_weights` (the largest number of distinct
values in one layer), `sparsity`, `nonzero_parameters`, `parameters` and the quality.
"""

from slipstream.contract import Json, StepInput, StepOutput
from slipstream.data.user_code import user_code_digest
from slipstream.frameworks.base import Schedule, toolchain
from slipstream.runner.context import Context
from slipstream.spec import Cluster, Spec
from slipstream.techniques import candidates


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return what determines the result, in addition to the candidate and the data."""
    return {
        "cluster": candidates.settings_of("cluster", spec, inputs),
        "loss": user_code_digest(spec.model.loss),
        "seed": spec.seed,
        "versions": toolchain(spec.model.framework),
    }


def run(context: Context) -> StepOutput:
    """Cluster, fine-tune, and log the result as a candidate."""
    section: Cluster = context.section
    source = candidates.source_of(context)
    assert source.artifact is not None
    context.run.params(section.model_dump(mode="json"))
    schedule = Schedule(section.epochs, section.learning_rate)
    constrained, metrics = candidates.train_constrained(context, context.fetch(source), section, schedule)
    folder = candidates.fresh_folder(context)
    constrained.save(folder, context.data.test)
    artifact = candidates.log(context, folder, "clustered", parents=[source.artifact.model_id])
    context.run.metrics(metrics)
    return context.output(artifact=artifact, metrics=metrics)
