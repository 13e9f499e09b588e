"""What `check` says of the size of the test split."""

from pathlib import Path

import pytest
from tests.steps.stages import WorldMaker

from slipstream import spec as specs
from slipstream.steps import sample_size

FASHION = specs.load(Path(__file__).parents[2] / "examples/fashion.yaml")


def test_without_an_earlier_run_it_shows_what_several_discordances_need() -> None:
    told, enough = sample_size.sentence(FASHION, 10_000, None)
    assert enough
    assert told == (
        "the test split has 10,000 samples; to show a drop of at most 1 points at 99.17 % each, since 6 engines "
        "compete, an engine that loses nothing needs about 734 / 1,501 / 5,369 where 0.1 % / 1 % / 5 % of their scores "
        "differ, and never fewer than 568"
    )


@pytest.mark.parametrize(("samples", "observed", "enough"), [(500, None, False), (2000, 2.3, False), (3000, 2.3, True)])
def test_it_says_when_there_are_too_few(samples: int, observed: float | None, enough: bool) -> None:
    told, found = sample_size.sentence(FASHION, samples, observed)
    assert found is enough and ("has only" in told) is not enough
    assert observed is None or "where 2.3 % of their scores differ, as in the last run" in told


def test_the_discordance_is_the_greatest_of_the_last_run(world_maker: WorldMaker) -> None:
    world = world_maker()
    assert sample_size.observed_percent(world.tracking) is None
    for key, values in (("week-1", (9.0,)), ("week-2", (1.5, 2.5))):
        for value in values:
            run = world.tracking.start(key, "validate", None, f"{key}-{value}")
            run.metrics({sample_size.DISCORDANCE: value})
    assert sample_size.observed_percent(world.tracking) == 2.5
