"""What cannot wait for the reconciler: a killed supervisord, and logs that grow.

supervisord keeps this process alive, and this process keeps supervisord alive.
"""

import logging

from slipstream.home import Home
from slipstream.platform import lifecycle, programs

log = logging.getLogger(__name__)

INTERVAL_S = 5


def keep_up(home: Home) -> None:
    """Look once after the embedded platform; nothing where `up` never ran. Raises Unavailable."""
    if not home.addresses_file().exists():
        return
    if lifecycle.revive(home):
        log.warning("supervisord was killed and runs again; its programs were taken over as they ran")
    programs.rotate_logs(home)
