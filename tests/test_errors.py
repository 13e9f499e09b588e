"""The error tree: what each class says, and the exit code that it means."""

import re

import pytest

from slipstream import errors


def tree(kind: type[errors.SlipstreamError]) -> list[type[errors.SlipstreamError]]:
    return [kind, *(found for sub in kind.__subclasses__() for found in tree(sub))]


ALL = tree(errors.SlipstreamError)


@pytest.mark.parametrize("kind", ALL, ids=lambda k: k.__name__)
def test_the_exit_code_says_whether_a_retry_helps(kind: type[errors.SlipstreamError]) -> None:
    if issubclass(kind, errors.InputError):
        assert kind.exit_code == errors.EXIT_INPUT
    elif issubclass(kind, errors.GateFailed):
        assert kind.exit_code == errors.EXIT_GATE
    else:
        assert kind.exit_code == errors.EXIT_RETRY


def test_headlines_tell_the_classes_apart() -> None:
    headlines = [kind.headline for kind in ALL]
    assert len(set(headlines)) == len(headlines)


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = re.findall(r"^    [│├└─ ]*(\w+) +", str(errors.__doc__), re.MULTILINE)
    assert drawn == [kind.__name__ for kind in ALL]
