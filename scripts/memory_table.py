"""Prints the table of docs/memory.md: which card, how much RAM and disk each model needs. --write puts it there.

python scripts/memory_table.py --write
"""

import pathlib
import sys

from wan_jax.diffusion.params import SamplingParams
from wan_jax.planning.memory import HOST_RESERVE, RESERVE, Plan
from wan_jax.presets import PRESETS
from wan_jax.runtime.offload import PROFILES

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "memory.md"
BEGIN, END = "<!-- scripts/memory_table.py begins -->\n", "<!-- scripts/memory_table.py ends -->\n"
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB that cards are sold with
SHARE = 0.95  # of a card that JAX takes (runtime/xla_flags.py)
GB = 1000**3


def table() -> str:
    """Of each preset at its own size, in bfloat16: the smallest card for each profile, RAM, disk."""
    lines = ["| model | size | " + " | ".join(f"`{name}`" for name in PROFILES) + " | RAM | disk |"]
    lines.append("|---" * (4 + len(PROFILES)) + "|")
    for name, config in PRESETS.items():
        request = SamplingParams().resolve(config)
        plan = Plan(config, request, "bfloat16")
        plan.compiled = False
        peaks = [plan.predict(profile).peak_bytes for profile in PROFILES.values()]
        cards = [next(card for card in CARDS if peak <= card * GB * SHARE * (1 - RESERVE)) for peak in peaks]
        ram, disk = plan.weight_bytes() / (1 - HOST_RESERVE), plan.float32_bytes
        size = f"{request.size[0]}x{request.size[1]}, {request.frames} frames"
        cells = [name, size, *(f"{card} GB" for card in cards), f"{ram / GB:.0f} GB", f"{disk / GB:.0f} GB"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def written(document: str) -> str:
    """The document with the table of today."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(written(DOCUMENT.read_text()))
    else:
        print(table(), end="")
