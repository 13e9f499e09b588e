"""The user's own metric: `module:function`, called as function(outputs, labels) with (N, …) arrays.

It returns (N,) scores in [0, 1], one for each sample; their mean is the value. The small-scale test also calls it, in
an environment without the framework: the module must import there.
"""

import numpy as np

from slipstream.contract.arrays import Array
from slipstream.data.user_code import user_function
from slipstream.errors import CodeError, EngineError, InputError, SpecError
from slipstream.measure.metrics.base import Mean, Records, finite, require_finite
from slipstream.plugins import short_name
from slipstream.spec import Call

SAME = 0.1
"""Answers that are not class scores are the same if their distance is at most this share of their length."""


class UserMetric(Mean):
    """A mean of scores that the user's function returns."""

    def __init__(self, function: str) -> None:
        self.name = short_name(function)
        self._function, self._call = function, user_function(Call(function=function))

    def classes(self, shape: tuple[int, ...]) -> int | None:
        """Return None: only the user's function knows what outputs mean."""
        return None

    def check_labels(self, labels: Array) -> None:
        """Accept all labels: only the user's function knows what they mean."""

    def check(self, outputs: Array, labels: Array, what: str, error: type[InputError] = EngineError) -> None:
        """See the protocol."""
        if not outputs.ndim or len(outputs) != len(labels):
            raise error(f"{what}: outputs have shape {outputs.shape}, not ({len(labels)}, …)")
        require_finite(outputs, what, error)

    def evaluate(self, outputs: Array, labels: Array) -> Records:
        """Return (N,) scores. Raise SpecError if the function fails, or returns something else."""
        whole = finite(outputs)
        finite_outputs = outputs if whole.all() else np.where(whole.reshape(-1, *[1] * (outputs.ndim - 1)), outputs, 0)
        try:
            answer = self._call(finite_outputs, labels)
        except CodeError as error:
            message = str(error).removeprefix(f"{self._function}: ")
            raise CodeError(
                f"objective.metric: {self._function} failed on outputs {outputs.shape} and labels {labels.shape}: "
                f"{message}"
            ) from error
        try:
            scores = np.asarray(answer, np.float64)
        except (TypeError, ValueError) as error:
            raise SpecError(f"objective.metric: {self._function} must return numbers, not {error}") from error
        if scores.shape != (len(labels),):
            raise SpecError(
                f"objective.metric: {self._function} must return ({len(labels)},) scores, one for each sample, not "
                f"{scores.shape}"
            )
        if scores.size and not (scores.min() >= 0 and scores.max() <= 1):  # NaN fails both
            raise SpecError(
                f"objective.metric: {self._function} must return scores from 0 to 1, but they run from "
                f"{scores.min():g} to {scores.max():g}"
            )
        return scores * whole

    def differ(self, one: Array, other: Array) -> bool:
        """Return whether the largest of several outputs (C,) are at different positions; for any other shape, whether
        the answers are further apart than a tenth of the longer one."""
        if one.shape != other.shape or not (np.isfinite(one).all() and np.isfinite(other).all()):
            return True
        if one.ndim == 1 and one.size > 1:
            return int(one.argmax()) != int(other.argmax())
        longer = max(float(np.linalg.norm(one)), float(np.linalg.norm(other)))
        return float(np.linalg.norm(one - other)) > SAME * longer
