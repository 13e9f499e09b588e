"""A spec as a Kubeflow Pipelines v2 package: the same flow, the same images, the same step commands.

Each stage is a separate pipeline, so that the stages show in the graph; each step is a container that receives its
upstream OUT documents as artifacts, and writes its own as one. It runs in the kubeflow environment; the command is
`slipstream compile SPEC --kfp OUT`.

Differences from the Airflow DAG, due to the capabilities of Kubeflow Pipelines: any failed cell ends the run (Airflow
continues with the others), and there is no manual approval, so a spec that asks for one is compiled only up to the
small-scale test.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from kfp import compiler, components, dsl, kubernetes

from slipstream import spec as specs
from slipstream.errors import InputError, SlipstreamError
from slipstream.home import Home
from slipstream.plan import catalog, flow, settings
from slipstream.plan.flow import Task
from slipstream.plan.settings import Settings
from slipstream.plugins import STEPS
from slipstream.spec import Spec

RETRIES = 2
FROM_CONFIG_MAP = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "SLIPSTREAM_RELEASES", "SLIPSTREAM_INGRESS")
FROM_SECRET = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "SLIPSTREAM_SIGNING_KEY",
)
"""Keys that a step takes from the settings' ConfigMaps and Secrets, if present."""


def key_of(task: Task) -> str:
    """Return a Python name: recipes and targets contain only letters, digits and hyphens."""
    return task.title.replace(" ", "_").replace("@", "__").replace("-", "_")


def builds_on(task: Task, chosen: Spec, earlier: Mapping[str, Task]) -> list[str]:
    """Return keys of the tasks whose outputs a task receives."""
    sources = flow.sources(task, chosen)
    return [key for key, producer in earlier.items() if producer in sources]


@dataclass
class Compiler:
    """Builds the package of one spec."""

    chosen: Spec
    installation: Settings
    done: dict[str, Task] = field(default_factory=dict)

    def pipeline(self, stop_after: str) -> Any:
        """Return the whole pipeline, with its stages in order. Raise InputError if a person must approve."""
        skipped = flow.skipped_stages(stop_after)
        if self.chosen.rollout.approval and "full_rollout" not in skipped:
            raise InputError(
                f"spec {self.chosen.name}: rollout.approval is true, and Kubeflow Pipelines has no step at which a "
                "person approves; compile with --stop-after small_scale_test and release with Airflow"
            )
        stages = [(name, self._stage(name)) for name in flow.STAGES if name not in skipped]

        # In one line: the SDK writes defaults into a comment at the top of the package.
        document = self.chosen.model_dump_json()

        def run(spec: str = document) -> None:
            artifacts: dict[str, Any] = {}
            for name, (needed, stage) in stages:
                common = {"spec": spec, "run_key": dsl.PIPELINE_JOB_NAME_PLACEHOLDER}
                group = stage(**common, **{k: artifacts[k] for k in needed}).set_display_name(name)
                artifacts |= group.outputs

        about = f"{self.chosen.model.name} (spec {catalog.fingerprint(self.chosen)})"
        return dsl.pipeline(name=catalog.dag_id(self.chosen.name), description=about)(run)

    def _stage(self, name: str) -> tuple[list[str], Any]:
        """Return the keys that a stage takes from earlier ones, and its pipeline, which outputs its own."""
        own = {key_of(task): task for task in flow.tasks(self.chosen, name)}
        needed: dict[str, list[str]] = {}
        for key, task in own.items():
            needed[key] = builds_on(task, self.chosen, self.done)
            self.done[key] = task
        inputs = list(dict.fromkeys(k for keys in needed.values() for k in keys if k not in own))

        def body(spec: Any, run_key: Any, *documents: Any) -> Any:
            artifacts = dict(zip(inputs, documents, strict=True))
            for key, task in own.items():
                artifacts[key] = self._run(
                    task, {"spec": spec, "run_key": run_key}, {k: artifacts[k] for k in needed[key]}
                )
            return Outputs(**{k: artifacts[k] for k in own})

        # mypy wants the fields of a NamedTuple spelt out; these are the stage's tasks.
        Outputs = NamedTuple("Outputs", [(k, dsl.Artifact) for k in own])  # type: ignore[misc]
        return inputs, dsl.pipeline(name=name.replace("_", "-"))(_with_signature(body, inputs, Outputs))

    def _run(self, task: Task, common: Mapping[str, Any], documents: Mapping[str, Any]) -> Any:
        """Add one step; return its OUT document."""
        ran = self._component(task, list(documents))(**common, **documents)
        ran.set_display_name(task.title).set_caching_options(False)  # steps know better what has changed
        if STEPS[task.step].retried:  # Kubeflow cannot tell a failed gate from a lost node
            ran.set_retry(num_retries=RETRIES, backoff_duration="30s", backoff_factor=2.0)
        self._place(task.step, ran)
        return ran.outputs["output"]

    def _component(self, task: Task, documents: list[str]) -> Any:
        arguments: list[Any] = ["step", task.step, "--spec", {"inputValue": "spec"}]
        arguments += ["--run-key", {"inputValue": "run_key"}]
        arguments += ["--cell", task.cell.key] if task.cell else []
        for name in documents:
            arguments += ["--upstream", {"inputPath": name}]
        arguments += ["--outputs", {"outputPath": "output"}]
        target = task.cell.target if task.cell else None
        return components.load_component_from_text(
            yaml.safe_dump(
                {
                    "name": task.title.replace("@", " at "),
                    "inputs": [
                        {"name": "spec", "type": "String"},
                        {"name": "run_key", "type": "String"},
                        *({"name": name, "type": "Artifact"} for name in documents),
                    ],
                    "outputs": [{"name": "output", "type": "Artifact"}],
                    "implementation": {
                        "container": {
                            "image": self.installation.image_of(task.step, self.chosen, target),
                            "command": ["slipstream"],
                            "args": arguments,
                        }
                    },
                }
            )
        )

    def _place(self, step: str, ran: Any) -> None:
        """Set resources, placement and environment."""
        resources, cluster = self.installation.resources_of(step, self.chosen), self.installation.kubernetes
        if resources.cpu is not None:
            ran.set_cpu_request(str(resources.cpu))
        if resources.memory is not None:
            ran.set_memory_request(resources.memory).set_memory_limit(resources.memory)
        if resources.gpu:
            ran.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(resources.gpu)
        for label, value in (resources.node_selector or {}).items():
            kubernetes.add_node_selector(ran, label, value)
        for toleration in resources.tolerations or ():
            kubernetes.add_toleration(ran, **toleration.model_dump())
        kubernetes.set_image_pull_policy(ran, cluster.pull_policy)
        for name in cluster.env_from_config_maps:
            kubernetes.use_config_map_as_env(ran, name, {k: k for k in FROM_CONFIG_MAP}, optional=True)
        for name in cluster.env_from_secrets:
            kubernetes.use_secret_as_env(ran, name, {k: k for k in FROM_SECRET}, optional=True)
        for name, value in {"SLIPSTREAM_TRAFFIC": "kserve", **self.installation.environment}.items():
            ran.set_env_variable(name, value)


def _with_signature(body: Callable[..., Any], inputs: list[str], outputs: Any) -> Callable[..., Any]:
    """Set a signature: the SDK reads a pipeline's inputs and outputs from it, and these depend on the spec."""
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, keyword, annotation=str) for name in ("spec", "run_key")]
    parameters += [inspect.Parameter(k, keyword, annotation=dsl.Input[dsl.Artifact]) for k in inputs]
    body.__signature__ = inspect.Signature(parameters, return_annotation=outputs)  # type: ignore[attr-defined]
    body.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": outputs}
    return body


def package(path: Path, out: Path, stop_after: str = "none") -> None:
    """Compile the spec file at `path` into the package `out` (YAML). Raise SpecError, InputError."""
    chosen = specs.load(path)
    spec_compiler = Compiler(chosen, settings.load(Home.from_environment()))
    compiler.Compiler().compile(spec_compiler.pipeline(stop_after), str(out))


def main() -> None:
    """Run the command line; exit codes are those of the command `slipstream`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stop-after", default="none", choices=flow.STOP_AFTER)
    arguments = parser.parse_args()
    try:
        package(arguments.spec, arguments.out, arguments.stop_after)
    except SlipstreamError as error:
        print(f"{error.headline}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
