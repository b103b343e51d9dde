"""Writes what a training run made as the package's weights: python -m wan_nano.export RUN [DESTINATION]."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from wan_jax.assets import NANO_WEIGHTS
from wan_jax.checkpoint import ConversionSummary, convert, memory_checkpoint
from wan_jax.config import WanConfig
from wan_jax.errors import InputError
from wan_jax.presets import get_preset
from wan_nano.files import TOKENIZER, load_weights, weights_file
from wan_nano.run import STAGES_LOG

LARGEST = 24_000_000  # bytes of all files

CARD = """\
---
license: apache-2.0
pipeline_tag: text-to-video
---

# nano

Text to video of a procedural world, small enough to ship with wan_jax: {parameters:.1f} million parameters,
{megabytes:.1f} MB in bfloat16, the structure of Wan2.2-T2V-A14B (two experts that meet at timestep {boundary:g}, a UMT5
text encoder, a causal video VAE), the diffusers layout.

    wan-jax generate "a red circle moves right"

**What it knows.** One or two objects on a white, light gray, dark gray or black background: circle, square, triangle,
star, cross, ring, heart, crescent moon, and handwritten digits 0 to 9, in red, orange, yellow, green, cyan, blue,
purple or pink, that move left, right, up, down or diagonally, in a circle, bounce, grow, shrink, rotate or stay,
slowly, normally or fast. Prompts in English, Chinese or Japanese. It is best at {width}x{height} with {frames} frames.

**Data.** All of it is made by `wan_nano`: videos are drawn on the device while training goes on, captions come from
a grammar in three languages. The digits are those of scikit-learn (UCI, E. Alpaydin and C. Kaynak, 1998, CC BY 4.0),
one in six of which is kept for tests. One in ten combinations of object, colour and motion, and some sentence frames of
every language, were never trained on; `wan-jax evaluate` asks for those.

**Recipe.** `wan-jax train --config configs/train_nano.py` (wan_nano/recipe.py holds every number): the text
encoder learns what captions say, the VAE reconstructs, both experts learn flow matching with shift {shift:g}, each in
its own range of timesteps. What was run:

{stages}

**Weaknesses.** It knows no other objects, colours, motions or words: a prompt from outside of its world gives something
from inside of it. Two objects may pass through each other or exchange attributes. Thin digits lose strokes.

**Measured** by `wan-jax evaluate` on prompts that were never trained on, right in % [95 % confidence interval]:

{measured}
"""
EVALUATION = "evaluation.json"  # of a run, as `wan-jax evaluate --checkpoint DESTINATION --report` writes it


def components(run: Path, config: WanConfig) -> dict[str, dict[str, np.ndarray]]:
    """The weights of a run by component, in bfloat16."""
    parts = {name: load_weights(run, name) for name in ("text_encoder", "vae", *config.experts)}
    if weights_file(run, "decoder").exists():  # it was trained on, for the same latents
        parts["vae"] |= load_weights(run, "decoder")
    return {name: {key: x.astype(jnp.bfloat16) for key, x in arrays.items()} for name, arrays in parts.items()}


def export(run: Path, destination: Path = NANO_WEIGHTS) -> ConversionSummary:
    """Writes the diffusers tree, its card, and what RUN/evaluation.json has measured if there is one.

    Raises RuntimeError where that is larger than it may be.
    """
    config = get_preset("nano")
    checkpoint = memory_checkpoint(config, components(run, config), run / TOKENIZER)
    summary = convert(checkpoint, destination, to="diffusers")
    (destination / "README.md").write_text(model_card(run, config, summary), encoding="utf-8")
    if (evaluation := _read_evaluation(run)) is not None:
        figures = {name: value for name, value in evaluation.items() if name != "videos"}
        (destination / EVALUATION).write_text(
            json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
    nbytes = sum(path.stat().st_size for path in destination.rglob("*") if path.is_file())
    if nbytes > LARGEST:
        raise RuntimeError(f"{destination} takes {nbytes:,} bytes, more than {LARGEST:,}")
    return summary


def model_card(run: Path, config: WanConfig, summary: ConversionSummary) -> str:
    """The card, with what the run's log says."""
    width, height = config.sampling.size
    return CARD.format(
        parameters=sum(component.parameters for component in summary.components) / 1e6,
        megabytes=summary.nbytes / 1e6,
        boundary=1000 * (config.sampling.boundary or 0),
        shift=config.sampling.shift,
        width=width,
        height=height,
        frames=config.sampling.frames,
        stages=_stages(run),
        measured=_measured(_read_evaluation(run)),
    )


def _read_evaluation(run: Path) -> dict[str, Any] | None:
    """The first setting of a run's evaluation."""
    path = run / EVALUATION
    return json.loads(path.read_text(encoding="utf-8"))["evaluations"][0] if path.exists() else None


def _measured(evaluation: dict[str, Any] | None) -> str:
    """Scores by language, and what was wrong most often where one object was asked for."""
    if evaluation is None:
        return "Not yet."
    scores = evaluation["scores"]
    lines = [f"| | {' | '.join(scores)} |", "|---" * (1 + len(scores)) + "|"]
    for metric in scores["all"]:
        rows = [scores[language][metric] for language in scores]
        cells = [
            f"{100 * row['right'] / row['total']:.0f} [{100 * row['low']:.0f}, {100 * row['high']:.0f}]" for row in rows
        ]
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _wrong_most_often(evaluation["videos"])])


def _wrong_most_often(videos: Sequence[dict[str, Any]], most: int = 5) -> str:
    """The kinds and motions that the fewest videos of one object show as they were asked for."""
    asked, wrong = Counter[str](), Counter[str]()
    for video in videos:
        if len(video["wanted"]) == 1:
            (wanted,) = video["wanted"]
            found = video["found"][0] if video["found"] else {}
            for name, prefix in (("kind", ""), ("motion", "motion ")):
                label = prefix + wanted[name]
                asked[label] += 1
                wrong[label] += found.get(name) != wanted[name]
    worst = sorted((label for label in wrong if wrong[label]), key=lambda label: wrong[label] / asked[label])[::-1]
    if not worst:
        return "With one object nothing was wrong."
    return f"Most often wrong: {', '.join(f'{label} ({wrong[label]} of {asked[label]})' for label in worst[:most])}."


def _stages(run: Path) -> str:
    """What all calls did together, by stage, and the figures that the last one reached."""
    path = run / STAGES_LOG
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = ["| stage | seconds | steps | last figures |", "|---|---|---|---|"]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        calls = [row for row in rows if row["stage"] == stage]
        seconds, steps = (sum(row[name] for row in calls) for name in ("seconds", "steps"))
        left_out = ("stage", "seconds", "steps", "step", "learning_rate", "steps_per_second")
        figures = ", ".join(f"{name} {value}" for name, value in calls[-1].items() if name not in left_out)
        lines.append(f"| {stage} | {seconds:.0f} | {steps:,.0f} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the output of a training run")
    parser.add_argument("destination", type=Path, nargs="?", default=NANO_WEIGHTS)
    values = parser.parse_args()
    try:
        print(export(values.run, values.destination))
    except InputError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
