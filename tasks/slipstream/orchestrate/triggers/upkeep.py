"""Upkeep that cannot wait for the reconciler: a killed supervisord, and growing logs.

supervisord keeps this process alive, and this process keeps supervisord alive.
"""

import logging

from slipstream.home import Home
from slipstream.platform import lifecycle, programs

log = logging.getLogger(__name__)

INTERVAL_S = 5


def keep_up(home: Home) -> None:
    """Check the embedded platform once; nothing to do if `up` never ran. Raise Unavailable."""
    if not home.addresses_file().exists():
        return
    if lifecycle.revive(home):
        log.warning("supervisord was killed and runs again; its programs were taken over as they ran")
    programs.rotate_logs(home)
