"""One of several processes, for test_distributed.py: `wan-jax` with the given arguments.

With HANGS=yes it hangs after its first step. Only then does its watchdog lose patience, after two seconds: loading and
compiling may take as long as they do on a busy machine. The watchdogs of the others (HANGS=other) wait longer.
"""

import os
import sys
import time

from wan_jax.cli.main import main
from wan_jax.runtime.distributed import Watchdog
from wan_jax.runtime.events import Event, StepDone

PATIENCE = {"yes": 2.0, "other": 20.0}

if __name__ == "__main__":
    if hangs := os.environ.get("HANGS"):
        listen = Watchdog.__call__

        def hang(watchdog: Watchdog, event: Event) -> None:
            listen(watchdog, event)
            if isinstance(event, StepDone):
                watchdog.seconds = PATIENCE[hangs]
                if hangs == "yes":
                    time.sleep(1000)

        Watchdog.__call__ = hang  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
