"""One of several processes, for test_hosts.py: `wan-jax` with the given arguments, which may hang on purpose."""

import os
import sys
import time

from wan_jax.cli.main import main
from wan_jax.pipeline import WanPipeline

if __name__ == "__main__":
    if os.environ.get("HANGS"):
        add_seconds = WanPipeline._add_seconds

        def hang(pipeline: WanPipeline, stage: str, seconds: float) -> None:
            add_seconds(pipeline, stage, seconds)
            if stage == "denoise":
                time.sleep(1000)

        WanPipeline._add_seconds = hang  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
