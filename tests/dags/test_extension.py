"""A technique and a runtime of another package (docs/extending.md), as Airflow's environment sees them."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.extension import package

SPEC = """\
name: extended
model: {registry: models:/tiny@source, architecture: examples.fashion:resnet}
data: examples.fashion:data
recipes: {short: [truncate, quantize]}
targets: {ours: {engine: warp}}
"""
PROGRAM = """\
import json, runpy, runtimes
from pathlib import Path
from slipstream.contract import StepInput
from slipstream.home import Home
from slipstream.plan import catalog
catalog.publish(Home.from_environment(), Path("extended.yaml"))
dag = runpy.run_path(DAGS + "/optimize.py")["optimize-extended"]
answer = runtimes.run_step("report", "extended.yaml", StepInput(run_key="r"), {})
print(json.dumps({"tasks": sorted(dag.task_ids), "nice": answer["nice"]}))
"""
STEP = f"""\
#!{sys.executable}
import json, os, sys
open(sys.argv[-1].removeprefix("--outputs="), "w").write(json.dumps({{"nice": os.nice(0)}}))
"""


def test_the_dag_has_the_technique_and_steps_run_in_the_runtime(home: Path, airflow_home: Path, tmp_path: Path) -> None:
    site = package.install(package.write(tmp_path / "warp"), tmp_path / "site")
    step = tmp_path / "envs/serve/bin/slipstream"
    step.parent.mkdir(parents=True)
    step.write_text(STEP)
    step.chmod(0o755)
    (tmp_path / "extended.yaml").write_text(SPEC)
    dags = str(package.ROOT / "dags")
    environment = package.environment(site, SLIPSTREAM_ENVS=str(tmp_path / "envs"), SLIPSTREAM_RUNTIME="nice")
    environment["PYTHONPATH"] += os.pathsep + dags
    command = [sys.executable, "-c", f"DAGS = {dags!r}\n{PROGRAM}"]
    completed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    answer = json.loads(completed.stdout.splitlines()[-1])
    assert {"truncate.short", "quantize.short", "build.short.ours"} <= set(answer["tasks"])
    assert answer["nice"] == min(19, os.nice(0) + 10)
