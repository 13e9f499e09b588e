"""Stage 1 of a spec that uses nothing but the package's parts, as a program: `python -m tests.extension.whole_run`."""

import json

from tests.steps.training import RUN_KEY, document, spec_of

from slipstream.contract import StepInput
from slipstream.engines.base import read_manifest
from slipstream.plan import flow
from slipstream.runner.run import run_step
from slipstream.store.tracking import fetch


def main() -> None:
    """Run the steps up to `validate`; print the figures of each."""
    written = document("extended", limit=400) | {
        "recipes": {"short": ["truncate", "quantize"]},
        "truncate": {"bits": 7},
        "quantize": {"samples": 32},
        "targets": {"ours": {"engine": "warp", "threads": 1, "options": {"spin": True}}},
        "objective": {"metric": "top3", "max_drop": 30.0},
    }
    spec, outputs = spec_of(written), []
    for stage in ("optimize", "accuracy_validation"):
        for task in flow.tasks(spec, stage):
            if task.step == "select":
                continue
            upstream = flow.upstream(task.step, spec, task.cell, outputs)
            step_input = StepInput(run_key=RUN_KEY, pipeline_run_id="", cell=task.cell, upstream=upstream)
            output = run_step(task.step, spec, step_input)
            assert output is not None
            outputs.append(output)
    built = next(o.artifact for o in outputs if o.step == "build" and o.cell and o.cell.recipe == "short")
    assert built is not None
    figures = {flow.Task(o.step, o.cell).title: o.metrics for o in outputs}
    print("\n" + json.dumps({"engine": read_manifest(fetch(built)).engine, "figures": figures}))


if __name__ == "__main__":
    main()
