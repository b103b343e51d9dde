"""One of several processes, for test_distributed.py: runs `wan-jax` once for each list of arguments in a JSON list.

After the first command has ended, another runs in the same processes, whatever came of the one before; the exit code is
that of the last. The environment says what goes wrong in the last one:

    HANGS=yes       hangs after its first step. Only then does its watchdog lose patience, after two seconds: loading
                    and compiling may take as long as they do on a busy machine.
    HANGS=other     another process does; the watchdog waits longer.
    FAILS=yes       raises after its first step.
    FULL_DISK=yes   no file that it writes can have over 100 bytes.
"""

import json
import os
import resource
import sys
import time

from wan_jax.cli.main import main
from wan_jax.runtime.distributed import Watchdog
from wan_jax.runtime.events import Event, StepDone

PATIENCE = {"yes": 2.0, "other": 20.0}


def break_down() -> None:
    listen, hangs = Watchdog.__call__, os.environ.get("HANGS")

    def after_a_step(watchdog: Watchdog, event: Event) -> None:
        listen(watchdog, event)
        if not isinstance(event, StepDone):
            return
        if os.environ.get("FAILS"):
            raise RuntimeError("no such luck")
        if hangs:
            watchdog.seconds = PATIENCE[hangs]
            time.sleep(1000 if hangs == "yes" else 0)

    Watchdog.__call__ = after_a_step  # type: ignore[method-assign]
    if os.environ.get("FULL_DISK"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


if __name__ == "__main__":
    *commands, last = json.loads(sys.argv[1])
    for command in commands:
        print(command[0], main(command), flush=True)
    break_down()
    sys.exit(main(last))
