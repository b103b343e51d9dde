"""Generates videos for prompts that training never saw and measures what they show: the yardstick for every change.

Every setting runs on the same prompts and the same initial noise, so that differences are differences of the settings.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from wan_jax.checkpoint import open_checkpoint
from wan_jax.cli.loading import joined, load_pipeline
from wan_jax.cli.options import OPTIONS, Options
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError, unknown_name
from wan_jax.pipeline import WanPipeline
from wan_jax.runtime.distributed import is_primary
from wan_jax.runtime.files import check_writable
from wan_nano.captions import LANGUAGES, write_caption
from wan_nano.classifier import Classifier
from wan_nano.measure import VideoReport, measure
from wan_nano.scenes import COLOURS, KINDS, MOTIONS, SPEEDS, Scenes, draw_scenes

SEED = 2**31 + 7  # of the scenes; training's seeds stay below
METRICS = {
    "object and colour": "one object: it is there, in its colour, and nothing else is",
    "shape or digit": "one object: the classifier names it",
    "motion": "one object: its direction or kind of motion",
    "speed": "one object, where the prompt says slow or fast",
    "two objects": "two objects: both there, colours, shapes or digits and motions all right",
    "two objects' colours": "two objects: both there in their colours, and nothing else is",
}


@dataclass(frozen=True)
class Prompt:
    """One text, what it asks for, and the seed of its video."""

    text: str
    language: str
    objects: tuple[dict[str, str], ...]  # kind, colour, motion, speed
    seed: int


def make_prompts(one: int, two: int, languages: Sequence[str] = LANGUAGES, seed: int = SEED) -> list[Prompt]:
    """Held-out combinations in held-out phrasings: `one` with one object and `two` with two, in every language."""
    for language in languages:
        if language not in LANGUAGES:
            raise unknown_name("language", language, LANGUAGES)
    prompts = []
    for number, pairs in ((one, 0.0), (two, 1.0)):
        scenes = draw_scenes(seed + int(pairs), max(number, 1), pairs=pairs, want_held_out=True)
        for language in languages:
            pick = random.Random(f"{language} {seed} {pairs}")
            for index in range(number):
                caption = write_caption(scenes, index, language, pick, held_out_frame=True)
                prompts.append(Prompt(caption.text, language, _objects(scenes, index), index + 1))
    return prompts


def _objects(scenes: Scenes, index: int) -> tuple[dict[str, str], ...]:
    return tuple(
        {
            "kind": KINDS[scenes.kind[index, n]],
            "colour": list(COLOURS)[scenes.colour[index, n]],
            "motion": MOTIONS[scenes.motion[index, n]],
            "speed": SPEEDS[scenes.speed[index, n]],
        }
        for n in range(scenes.count[index])
    )


def judge(prompt: Prompt, report: VideoReport) -> dict[str, bool]:
    """Which metrics apply to this prompt, and whether the video meets them."""
    colours = {found.colour for found in report.objects} == {wanted["colour"] for wanted in prompt.objects}
    if len(prompt.objects) == 2:
        found = [report.find(wanted["colour"]) for wanted in prompt.objects]
        right = colours and all(
            one is not None and (one.kind, one.motion) == (wanted["kind"], wanted["motion"])
            for one, wanted in zip(found, prompt.objects, strict=True)
        )
        return {"two objects": right, "two objects' colours": colours}
    (wanted,) = prompt.objects
    # In another colour it may still be the right thing.
    only = report.find(wanted["colour"]) or (report.objects[0] if report.objects else None)
    result = {
        "object and colour": colours,
        "shape or digit": only is not None and only.kind == wanted["kind"],
        "motion": only is not None and only.motion == wanted["motion"],
    }
    if wanted["speed"] != "normal":
        result["speed"] = result["motion"] and only is not None and only.speed == wanted["speed"]
    return result


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927)."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return max(0.0, (middle - half) / (1 + z**2 / total)), min(1.0, (middle + half) / (1 + z**2 / total))


def generate_videos(
    pipeline: WanPipeline, prompts: Sequence[Prompt], settings: SamplingParams, batch: int
) -> Iterator[np.ndarray]:
    """Yields uint8 [F, H, W, 3] for each prompt, from the noise of its own seed."""
    requests = [dataclasses.replace(settings, prompt=prompt.text, seed=prompt.seed) for prompt in prompts]
    for start in range(0, len(prompts), batch):
        rows = requests[start : start + batch]
        rows += [rows[-1]] * (batch - len(rows))  # one shape, one compilation
        for result in itertools.islice(pipeline.results(rows), len(prompts) - start):
            yield np.concatenate(list(result.frames()))


def default_batch() -> int:
    """How many prompts at once keep the device busy."""
    return 6 if jax.default_backend() == "cpu" else 48


def measure_all(videos: Iterable[np.ndarray], classifier: Classifier) -> list[VideoReport]:
    """Measures videos as they come, by threads."""
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:
        waiting = [threads.submit(measure, frames, classifier) for frames in videos]
        return [report.result() for report in waiting]


@dataclass(frozen=True)
class Evaluation:
    """What one setting's videos show. str() is a table."""

    label: str
    settings: dict[str, Any]
    prompts: list[Prompt]
    reports: list[VideoReport]

    def score(self, metric: str, language: str | None = None) -> tuple[int, int]:
        """How many prompts are right, and how many there are."""
        verdicts = [
            judge(prompt, report)
            for prompt, report in zip(self.prompts, self.reports, strict=True)
            if language in (None, prompt.language)
        ]
        values = [verdict[metric] for verdict in verdicts if metric in verdict]
        return sum(values), len(values)

    @property
    def languages(self) -> list[str]:
        return list(dict.fromkeys(prompt.language for prompt in self.prompts))

    def steadiness(self) -> dict[str, float]:
        """Means over videos: flicker (levels of 255), jitter (pixels), and how often a frame shows the same shape."""
        objects = [found for report in self.reports for found in report.objects]
        return {
            "flicker": float(np.mean([report.flicker for report in self.reports])),
            "jitter": float(np.mean([found.jitter for found in objects])) if objects else 0.0,
            "shape persistence": float(np.mean([found.shape_persistence for found in objects])) if objects else 0.0,
        }

    def as_json(self) -> dict[str, Any]:
        scores = {}
        for language in (*self.languages, None):
            rows = {}
            for metric in METRICS:
                right, total = self.score(metric, language)
                if total:
                    low, high = wilson(right, total)
                    rows[metric] = {"right": right, "total": total, "low": round(low, 4), "high": round(high, 4)}
            scores[language or "all"] = rows
        videos = [
            {
                "prompt": prompt.text,
                "seed": prompt.seed,
                "wanted": prompt.objects,
                "found": [dataclasses.asdict(found) for found in report.objects],
            }
            for prompt, report in zip(self.prompts, self.reports, strict=True)
        ]
        return {
            "label": self.label,
            "settings": self.settings,
            "scores": scores,
            "steadiness": self.steadiness(),
            "videos": videos,
        }

    def __str__(self) -> str:
        columns = [*self.languages, *([None] if len(self.languages) > 1 else [])]
        lines = [f"{self.label}: right in % [95 % confidence interval]"]
        lines.append(f"{'':<22}" + "".join(f"{language or 'all':>20}" for language in columns))
        for metric in METRICS:
            cells = []
            for language in columns:
                right, total = self.score(metric, language)
                low, high = wilson(right, total)
                share = f"{100 * right / total:.1f} [{100 * low:.0f}, {100 * high:.0f}]" if total else "-"
                cells.append(f"{share:>20}")
            if self.score(metric)[1]:
                lines.append(f"{metric:<22}" + "".join(cells))
        figures = self.steadiness()
        lines.append("  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """Two settings on the same prompts and seeds. str() is a table."""

    first: Evaluation
    second: Evaluation
    psnr: float  # mean over videos, dB; inf where all frames are equal, nan where sizes differ

    def changes(self, metric: str) -> tuple[int, int]:
        """Prompts that only the first, and that only the second gets right."""
        pairs = [
            (judge(prompt, one)[metric], judge(prompt, two)[metric])
            for prompt, one, two in zip(self.first.prompts, self.first.reports, self.second.reports, strict=True)
            if metric in judge(prompt, one)
        ]
        return sum(one and not two for one, two in pairs), sum(two and not one for one, two in pairs)

    def as_json(self) -> dict[str, Any]:
        changes = {metric: self.changes(metric) for metric in METRICS if self.first.score(metric)[1]}
        psnr = round(self.psnr, 2) if math.isfinite(self.psnr) else None
        return {"first": self.first.label, "second": self.second.label, "psnr": psnr, "only_right_in": changes}

    def __str__(self) -> str:
        psnr = "videos of another size" if math.isnan(self.psnr) else f"PSNR {self.psnr:.1f} dB"
        lines = [f"{self.second.label} against {self.first.label}: {psnr}"]
        for metric in METRICS:
            if (total := self.first.score(metric)[1]) == 0:
                continue
            before, after = self.first.score(metric)[0] / total, self.second.score(metric)[0] / total
            lost, won = self.changes(metric)
            lines.append(
                f"{metric:<22}{100 * before:>7.1f} -> {100 * after:.1f} %   "
                f"({lost} only in the first, {won} only in the second; p = {sign_test(lost, won):.2f})"
            )
        return "\n".join(lines)


def sign_test(lost: int, won: int) -> float:
    """Two-sided probability of so unequal a split if the settings were equally good (exact McNemar)."""
    total = lost + won
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    return min(1.0, 2 * tail)


def psnr(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> float:
    """Mean over videos of their peak signal-to-noise ratio, dB; nan where they differ in size or length."""
    if any(a.shape != b.shape for a, b in zip(first, second, strict=True)):
        return math.nan
    errors = [np.square(a.astype(np.float32) - b).mean() for a, b in zip(first, second, strict=True)]
    with np.errstate(divide="ignore"):
        return float(np.mean(10 * np.log10(255**2 / np.array(errors))))


def evaluate(
    runs: Sequence[tuple[str, Callable[[], tuple[WanPipeline, SamplingParams]]]],
    prompts: Sequence[Prompt],
    *,
    batch: int | None = None,
    output: Path | None = None,
    sheet: Path | None = None,
    show: Callable[[str], None] = print,
) -> list[Evaluation]:
    """Evaluates settings, the first of which the others are compared with.

    Args:
      runs: of each setting its label and a function that gives the pipeline and the settings.
      prompts: see `make_prompts`.
      batch: prompts denoised at once; None: what suits the device.
      output: where the JSON goes; it is written again after each setting.
      sheet: a .png that shows frames of the first setting's videos, a row each.
      show: called with each table.
    """
    if not prompts:
        raise InputError("no prompts to evaluate; ask for at least one object or two")
    classifier = Classifier.load()
    evaluations: list[Evaluation] = []
    first_videos: list[np.ndarray] = []
    comparisons = []
    for label, prepare in runs:
        pipeline, settings = prepare()
        videos: list[np.ndarray] = []
        made = generate_videos(pipeline, prompts, settings, min(batch or default_batch(), len(prompts)))
        reports = measure_all(_kept(made, videos), classifier)  # while the next are made
        evaluations.append(Evaluation(label, settings.as_json(), list(prompts), reports))
        show(str(evaluations[-1]))
        if len(evaluations) == 1:
            first_videos = videos
            if sheet is not None:
                save_sheet(sheet, videos[:: max(1, len(videos) // 48)])
        else:
            comparisons.append(Comparison(evaluations[0], evaluations[-1], psnr(first_videos, videos)))
            show(str(comparisons[-1]))
        if output is not None:
            content = {
                "metrics": METRICS,
                "evaluations": [evaluation.as_json() for evaluation in evaluations],
                "comparisons": [comparison.as_json() for comparison in comparisons],
            }
            output.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return evaluations


def _kept(videos: Iterable[np.ndarray], into: list[np.ndarray]) -> Iterator[np.ndarray]:
    for video in videos:
        into.append(video)
        yield video


def save_sheet(path: Path, videos: Sequence[np.ndarray], frames: int = 5, columns: int = 3) -> None:
    """Draws one picture: evenly spaced frames of each video, side by side."""
    rows = [np.concatenate(video[np.linspace(0, len(video) - 1, frames).astype(int)], axis=1) for video in videos]
    rows += [np.zeros_like(rows[0])] * (-len(rows) % columns)
    sheet = np.concatenate([np.concatenate(rows[n::columns], axis=0) for n in range(columns)], axis=1)
    Image.fromarray(sheet).save(path, optimize=True)


def overridden(options: Options, text: str) -> Options:
    """Returns the options with those that a text such as "steps=10 guidance=2,4" sets; raises InputError."""
    values: dict[str, Any] = {}
    for part in text.split():
        name, equals, value = part.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if name not in OPTIONS:
            raise unknown_name("option", name, OPTIONS)
        if not equals:
            raise InputError(f"{part!r}: write NAME=VALUE, such as steps=10; values are those of wan-jax generate")
        values[name] = (value,) if OPTIONS[name].metadata["kind"] is tuple else value
    return dataclasses.replace(options, **values)


def evaluate_options(
    options: Options,
    compare: Sequence[str],
    *,
    one: int,
    two: int,
    languages: str,
    batch: int | None,
    report: Path | None,
    sheet: Path | None = None,
) -> list[Evaluation]:
    """What `wan-jax evaluate` does: the options, then the options with each of `compare`.

    A pipeline is loaded again only for options that concern loading. Of several processes all measure; the first shows
    and writes what comes of it.
    """
    if report is not None:
        check_writable(report, name="--report")
    if sheet is not None:
        check_writable(sheet, name="--sheet", endings=(".png",))
    if batch is not None and batch < 1:
        raise InputError(f"batch {batch}: give at least 1")
    for text in ("", *compare):
        chosen = overridden(options, text)
        chosen.resolve(open_checkpoint(chosen.checkpoint).config)
    loaded: dict[tuple, WanPipeline] = {}

    def prepare(text: str) -> tuple[WanPipeline, SamplingParams]:
        chosen = overridden(options, text)
        loras = (chosen.lora, chosen.lora_high, chosen.lora_low)
        key = (chosen.checkpoint, chosen.dtype, chosen.vae_dtype, chosen.profile, loras)
        if key not in loaded:
            loaded.clear()
            loaded[key] = load_pipeline(chosen, on_event=run.emit)
        return loaded[key], chosen.resolve(loaded[key].config)

    prompts = make_prompts(one, two, languages.split(","))
    runs = [(text or "as given", functools.partial(prepare, text)) for text in ("", *compare)]
    with joined(options) as (options, run):
        if is_primary():
            return evaluate(runs, prompts, batch=batch, output=report, sheet=sheet)
        return evaluate(runs, prompts, batch=batch, show=lambda table: None)
