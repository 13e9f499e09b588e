"""What supervisord runs in place of a program: read its command and environment from a file, then become it.

The ini format of supervisord cannot carry every value (a quote of each kind, ` ;` and `#` start a comment), and
environments hold secrets. Both are why a program's command and environment lie in a JSON file of their own, which
only its owner can read. Run by path, with nothing imported, so that it adds some 20 ms and no memory.
"""

import json
import os
import sys


def main(description: str) -> None:
    """Replace this process by the described one; 127 when its command cannot be executed, as a shell would."""
    with open(description, encoding="utf-8") as file:  # noqa: PTH123 (pathlib would double the start time)
        program = json.load(file)
    command = program["command"]
    try:
        if program["directory"]:
            os.chdir(program["directory"])
        os.execvpe(command[0], command, os.environ | program["environment"])  # noqa: S606 (no shell is the point)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
