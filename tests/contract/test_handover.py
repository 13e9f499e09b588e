"""Details of the release path's steps: read by what they are, and refused by name where they are not."""

import pytest

from slipstream.contract import StepOutput
from slipstream.contract.handover import Rollout, Selection
from slipstream.errors import DataError


def output(**details: object) -> StepOutput:
    return StepOutput(step="select", identity="i", run_id="r", details=details)


def test_what_is_written_is_read_again_and_what_a_later_version_adds_is_ignored() -> None:
    selection = Selection(winner="int8@server", champion=None, version="3", best_per_target={"server": None})
    assert Selection.of(output(**selection.document(), added_later=1)) == selection
    assert Rollout.of(output()) == Rollout()


@pytest.mark.parametrize(
    ("details", "field"),
    [({"champion": None}, "winner"), ({"winner": "a", "champion": "1", "rows": [{"cell": "a"}]}, "rows.0.evidence")],
)
def test_details_of_another_form_name_the_step_and_the_field(details: dict[str, object], field: str) -> None:
    with pytest.raises(DataError, match=rf"output of step select: details\.{field}: Field required"):
        Selection.of(output(**details))
