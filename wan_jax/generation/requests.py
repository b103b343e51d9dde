"""The requests of a call, and which of them may be one batch."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import Field, replace
from typing import Any

import numpy as np

from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError, unknown_name
from wan_jax.fields import integer, knobs, seed_number

# Arguments of diffusers' pipelines that have another name here.
DIFFUSERS_NAMES = {
    "callback_on_step_end": "on_event",
    "generator": "seed",
    "guidance_scale": "guidance",
    "guidance_scale_2": "guidance",
    "height": "size",
    "latents": "initial_latents",
    "num_frames": "frames",
    "num_inference_steps": "steps",
    "num_videos_per_prompt": "num_videos",
    "width": "size",
}


def make_requests(
    prompt: str | SamplingParams | Iterable[str | SamplingParams],
    choices: Mapping[str, Any],
    num_videos: int = 1,
) -> list[SamplingParams]:
    """The requests of a call: one video for each prompt, or `num_videos` of them side by side.

    Args:
        prompt: one or several; a SamplingParams keeps its own choices but for those given beside it.
        choices: fields of all videos. Those that may differ ("per_row") may be sequences, one value for each video.
            One seed for several prompts counts up: seed, seed + 1, ...

    Raises:
        InputError: an argument that does not exist, a sequence of another length, or no prompt at all.
    """
    if isinstance(prompt, (str, SamplingParams)):
        prompt = [prompt]
    elif isinstance(prompt, (bytes, bytearray, Mapping, Set)) or not isinstance(prompt, Iterable):
        raise InputError(f"prompt {prompt!r:.60}: must be text, or a list of texts")
    if not (prompts := list(prompt)):
        raise InputError("no prompts: give at least one")
    names = {each.name: each for each in knobs(SamplingParams)}
    for name in choices:
        if name in DIFFUSERS_NAMES:
            raise InputError(f"unknown argument {name!r}; did you mean {DIFFUSERS_NAMES[name]!r}?")
        if name not in names:
            raise unknown_name("argument", name, [*names, "num_videos", "on_event", "cancel", "state"])
    num_videos = integer("num_videos", num_videos)
    if num_videos < 1:
        raise InputError(f"num_videos {num_videos}: give at least 1")
    prompts = [each for each in prompts for _ in range(num_videos)]
    given = {name: value for name, value in choices.items() if value is not None}
    rows = {name: _rows(name, given.pop(name), len(prompts)) for name in list(given) if _is_rows(names[name], given)}
    first_seed = seed_number("seed", given.get("seed", 0))
    requests = []
    for index, each in enumerate(prompts):
        own = given | {name: values[index] for name, values in rows.items()}
        if "seed" in given or ("seed" not in rows and not isinstance(each, SamplingParams)):
            own["seed"] = first_seed + index
        elif "seed" not in rows and num_videos > 1:
            own["seed"] = vars(each)["seed"] + index % num_videos
        if isinstance(each, SamplingParams):
            requests.append(replace(each, **own) if own else each)
        else:
            requests.append(SamplingParams(each, **own))
    return requests


# What the videos of one batch have in common: all but what belongs to a row.
SHARED = [
    each.name
    for each in knobs(SamplingParams)
    if not each.metadata["per_row"] and each.name not in ("prompt", "fps", "guidance", "noise")
]


def check_together(requests: Sequence[SamplingParams]) -> None:
    """Raises InputError unless resolved requests may be one batch: all have a prompt, and one size, schedule, ..."""
    for request in requests:
        if request.prompt is None:
            raise InputError("no prompt: write what the video shows")
        for name in SHARED:
            if (value := vars(request)[name]) != vars(requests[0])[name]:
                raise InputError(f"{name} {value}: videos of one batch have the same {name}; make this one apart")


def _is_rows(each: Field, choices: Mapping[str, Any]) -> bool:
    value = choices[each.name]
    if isinstance(value, (list, tuple)):
        return each.metadata["per_row"]
    dims = np.ndim(value) if hasattr(value, "shape") else 0
    return (each.name == "initial_latents" and dims == 5) or (each.name == "seed" and dims == 1)


def _rows(name: str, values: Sequence[Any], count: int) -> Sequence[Any]:
    if len(values) != count:
        raise InputError(f"{name} has {len(values)} values for {count} videos; give one for each, or one for all")
    return values
