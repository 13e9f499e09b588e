"""A module that answers as it is told: `python -m tests.contract.answering REPLY`."""

import sys
import time
from typing import Literal

from slipstream.contract import Document
from slipstream.contract.ask import answer


class Told(Document):
    how: Literal["plainly", "noisily", "exit 0", "exit 3", "raise", "never"]


class Doubled(Document):
    how: str


def reply(told: Told) -> Doubled:
    if told.how == "noisily":
        print("{}\n" * 3)
        sys.stdin.read()
    elif told.how.startswith("exit"):
        print("went away")
        sys.exit(int(told.how[-1]))
    elif told.how == "raise":
        raise ValueError("no idea")
    elif told.how == "never":
        time.sleep(60)
    return Doubled(how=told.how * 2)


if __name__ == "__main__":
    answer(Told, reply)
