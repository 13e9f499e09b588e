"""Rebuilds an engine from its candidate, in a process in the environment of its libraries.

`load` says why an engine folder cannot be loaded in this environment, if so. `build` builds the same target from the
same candidate, and compares the answers with those that the old engine recorded. `log` logs the new engine to MLflow.
"""

from pathlib import Path
from typing import Literal

from slipstream import log_lines
from slipstream.contract import Artifact, Document, Verdict
from slipstream.contract.ask import answer
from slipstream.data import tokens
from slipstream.engines import recorded
from slipstream.engines.base import build_engine, load_engine, read_manifest, record_answers
from slipstream.errors import SlipstreamError
from slipstream.onnx.agreement.bounds import explain_mismatch, measure, repeated

GATE = "recorded answers"


class Request(Document):
    """An engine to rebuild."""

    engine: Path
    """Folder of the old engine."""
    candidate: Path
    """Folder of the candidate that it was built from."""
    folder: Path
    """Where the new engine is built."""
    cell: str
    parent: str
    """Logged model of the candidate."""
    run_id: str
    experiment_id: str


class Work(Document):
    """What the process does."""

    action: Literal["load", "build", "log"]
    folder: Path | None = None
    """Engine folder that is loaded."""
    request: Request | None = None
    """What is built or logged."""


class Finding(Document):
    """Result of a request."""

    problem: str = ""
    """Why the engine cannot be loaded or built; empty if it can."""
    artifact: Artifact | None = None
    verdict: Verdict | None = None


def load(folder: Path) -> Finding:
    """Check that an engine loads here, and reproduces its recorded answers if the facts of its build differ."""
    load_engine(folder)
    return Finding()


def build(request: Request) -> Finding:
    """Build, and report whether the new engine, now in its folder, reproduces the old one's recorded answers."""
    old, tokenizer = read_manifest(request.engine), request.engine / tokens.TOKENIZER
    samples, expected = recorded.read(request.engine)
    build_engine(request.candidate, old.target, request.folder, tokenizer.read_text() if tokenizer.exists() else None)
    runner = load_engine(request.folder)
    answers = recorded.answer(runner, samples)
    problem = explain_mismatch(expected, answers, repeated(old.target.precision, quantized=old.quantized))
    if problem is not None:
        return Finding(
            verdict=Verdict(gate=GATE, answer="fail", reason=f"the rebuilt engine {problem}", n=len(samples))
        )
    record_answers(request.folder, runner, samples)
    largest = measure(expected, answers).max_abs_diff
    reason = f"the answers to {len(samples)} samples are those of the old engine, largest difference {largest:.2g}"
    return Finding(verdict=Verdict(gate=GATE, answer="pass", reason=reason, n=len(samples)))


def log(request: Request) -> Finding:
    """Log the built engine as an MLflow model."""
    from slipstream.store.signature import signature
    from slipstream.store.tracking import StepRun, connected

    manifest = read_manifest(request.folder)
    artifact = StepRun(connected(), request.run_id, request.experiment_id).log_model(
        request.folder,
        request.cell,
        signature(manifest.input_shape, manifest.input_dtype, manifest.output_shape),
        parents=[request.parent],
        metadata={"fingerprint": manifest.fingerprint, "candidate_sha256": manifest.candidate_sha256},
    )
    return Finding(artifact=artifact)


def do(work: Work) -> Finding:
    """Do one of the three; an error is a finding as well."""
    log_lines.configure()
    try:
        if work.request is None:
            assert work.folder is not None, "there is an engine to load, or a request"
            return load(work.folder)
        return build(work.request) if work.action == "build" else log(work.request)
    except SlipstreamError as error:
        return Finding(problem=str(error))


if __name__ == "__main__":
    answer(Work, do)
