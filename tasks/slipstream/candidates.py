"""What the steps that make candidates share: the folder, the log entry in MLflow, the quality."""

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slipstream.contract import Artifact
from slipstream.data import Split
from slipstream.frameworks.base import Framework, read_manifest
from slipstream.signature import signature
from slipstream.steps.base import Context
from slipstream.tracking import fetch

_log = logging.getLogger(__name__)


def fresh_folder(context: Context) -> Path:
    """The folder for a candidate, without what a killed attempt may have left there."""
    folder = context.workdir / "candidate"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def log(context: Context, folder: Path, name: str, parents: Iterable[str | None] = ()) -> Artifact:
    """Log a candidate folder as an MLflow model, linked to the logged models that it was made from."""
    manifest = read_manifest(folder)
    shapes = signature(manifest.input_shape, manifest.input_dtype, manifest.output_shape)
    return context.run.log_model(
        folder,
        name,
        shapes,
        parents=[p for p in parents if p is not None],
        metadata={"candidate": manifest.model_dump(mode="json")},
    )


def quality(answers: npt.NDArray[Any], split: Split) -> dict[str, float]:
    """`test_top1` in percent, for people: no gate uses it, since they judge built engines."""
    return {"test_top1": float(np.mean(answers.argmax(1) == split.labels) * 100)}


def soft_answers(context: Context, framework: Framework, teacher: Artifact) -> npt.NDArray[np.float32]:
    """(N, classes) logits of a candidate for the training split, from the cache or computed once.

    They belong to the images as they are, so whoever learns from them trains without augmentation.
    In a group process 0 computes them, and all read its file.
    """
    split = context.data.train
    path = context.home.cache / "soft-answers" / f"{teacher.sha256}-{split.digest}.npy"
    if context.group.leads:
        if path.exists():
            _log.info("teacher: answers for %d images found in the cache", len(split))
        else:
            _log.info("teacher: answering %d images", len(split))
            _store(path, framework.logits(framework.load(fetch(teacher)), split.inputs))
    context.group.bring(path)
    answers: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
    return answers


def _store(path: Path, answers: npt.NDArray[np.float32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        np.save(file, answers)
    aside.replace(path)
