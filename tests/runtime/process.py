"""One of several processes, for test_hosts.py: `wan-jax` with the given arguments, which may hang on purpose."""

import os
import sys
import time

from wan_jax.cli.main import main
from wan_jax.runtime.events import Event, Run, StepDone

if __name__ == "__main__":
    if os.environ.get("HANGS"):
        emit = Run.emit

        def hang(run: Run, event: Event) -> None:
            emit(run, event)
            if isinstance(event, StepDone):
                time.sleep(1000)

        Run.emit = hang  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
