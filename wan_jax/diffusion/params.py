"""What one video is made of: the request, checked before any work starts.

Every knob is one field of `SamplingParams`. The arguments of a call, the command line's flags, the keys of recipes and
of files of prompts derive from the fields; cli/options.py adds what a run of the command line has beside them.
"""

import math
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from wan_jax.config import PerExpert, WanConfig
from wan_jax.diffusion.experts import as_pair, by_expert
from wan_jax.diffusion.schedule import GRIDS, Schedule, make_schedule
from wan_jax.errors import InputError, unknown_name
from wan_jax.fields import (
    anything,
    convert_fields,
    integer,
    knob,
    knobs,
    number,
    path_of,
    rate,
    seed_number,
    text,
    width_height,
    words,
)
from wan_jax.media.image import Picture, check_images, output_size

if TYPE_CHECKING:
    from wan_jax.kernels.attention import AttentionOptions
    from wan_jax.parallel.mesh_spec import MeshSpec

NOISES = ("jax", "torch")
WEIGHTS = {"as_stored": None, "int8": "int8", "float8": "float8_e4m3fn"}  # the dtype that kernels of layers get
DTYPES = ("bfloat16", "float32")
PROFILE_NAMES = ("auto", "resident", "swap", "stream")  # what the last three mean is in runtime/offload.py


@dataclass(frozen=True)
class SamplingParams:
    """The request of one video.

    A field that is None takes the preset's value (`resolve`). Values may be written as on the command line:
    `SamplingParams("a cat boxes", size="832x480", guidance="1,3.5")`.
    """

    prompt: str = knob(words, "what the video shows")
    negative_prompt: str = knob(words, "what to steer away from", metavar="TEXT", per_row=True)
    image: Any = knob(
        anything, "picture that the video starts from, for models that take one", metavar="FILE", per_row=True
    )
    last_image: Any = knob(
        anything, "picture that it ends with, for models that take two", metavar="FILE", per_row=True
    )
    size: tuple[int, int] = knob(
        width_height,
        "WIDTHxHEIGHT in pixels, multiples of 16 (default: the preset's, in the image's shape)",
        metavar="WxH",
    )
    frames: int = knob(integer, "number of frames, 4n + 1", metavar="N")
    fps: float = knob(rate, "frames per second of the file, such as 24, 12.5 or 30000/1001", metavar="N")
    steps: int | PerExpert[int] = knob(
        integer, "number of denoising steps, or LOW,HIGH for each expert's", metavar="N[,N]", both_experts=True
    )
    guidance: float | PerExpert[float] = knob(
        number, "one number, or LOW,HIGH for the two experts; 1 is none", metavar="LOW[,HIGH]", both_experts=True
    )
    shift: float = knob(number, "shift of the sigma schedule", metavar="S")
    boundary: float | None = knob(number, "noise level at which the experts change, from 0 to 1", metavar="SIGMA")
    solver: str | PerExpert[str] = knob(
        text, f"{' | '.join(GRIDS['official'])}, or LOW,HIGH", metavar="NAME[,NAME]", both_experts=True
    )
    schedule: str | PerExpert[str] = knob(
        text, f"{' | '.join(GRIDS)}, or LOW,HIGH", metavar="NAME[,NAME]", both_experts=True
    )
    seed: int = knob(
        seed_number,
        "the initial noise depends on it; or random (default 0)",
        default=0,
        metavar="N",
        per_row=True,
    )
    noise: str = knob(text, f"{' | '.join(NOISES)}: whose random numbers (default jax)", default="jax", metavar="NAME")
    initial_latents: Any = knob(
        anything, "start from these float32 [C, F', h, w] latents", metavar="F.npy", per_row=True
    )
    attention: str | None = knob(text, "implementation of attention (default: the fastest exact one)", metavar="NAME")
    attention_window: int | None = knob(
        integer, "tokens attend to latent frames at most N away; approximate (default: all frames)", metavar="N"
    )
    weights: str = knob(
        text,
        f"{' | '.join(WEIGHTS)}: the kernels of the denoisers' layers; 8 bits are approximate, and half as large",
        default="as_stored",
        metavar="NAME",
    )

    if TYPE_CHECKING:  # the fields' types are those of resolved values; __post_init__ takes more

        def __init__(self, prompt: str | None = None, **fields: Any) -> None: ...

    # The model that `resolve` has checked the request against; a copy by dataclasses.replace is unresolved again.
    _resolved_for: WanConfig | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        convert_fields(self)

    def resolve(self, config: WanConfig) -> Self:
        """The request with every field set: values of the preset, pictures and latents read, everything checked.

        A request without a prompt is a plan (what size, how many steps); it needs no picture.

        Raises:
            InputError: the first choice that the model cannot serve.
        """
        if self._resolved_for is config:
            return self
        image, last_image = (None if x is None else Picture.read(x) for x in (self.image, self.last_image))
        if self.prompt is not None:
            check_images(config, image is not None, last_image is not None)
        values = {name: value for name, value in vars(config.sampling).items() if vars(self)[name] is None}
        if image is not None and self.size is None:
            values["size"] = output_size(config, image.size)
        if image is not None and last_image is not None:
            last_image = last_image.cover(image.size)
        low, high = as_pair(values.get("guidance", self.guidance))
        values["guidance"] = PerExpert(low=low, high=high)
        latents = None if self.initial_latents is None else read_latents(self.initial_latents)
        resolved = replace(self, **values, image=image, last_image=last_image, initial_latents=latents)
        for name in ("solver", "schedule"):
            low, high = as_pair(vars(resolved)[name])
            if low == high:
                object.__setattr__(resolved, name, low)
        resolved._check(config)
        object.__setattr__(resolved, "_resolved_for", config)
        return resolved

    def _check(self, config: WanConfig) -> None:
        for axis, pixels, multiple in zip(("width", "height"), self.size, config.size_multiple[::-1], strict=True):
            if pixels <= 0 or pixels % multiple:
                raise InputError(
                    f"size {self.size[0]}x{self.size[1]}: the {axis} must be a multiple of {multiple}; "
                    f"use {_nearest_multiple(pixels, multiple)}"
                )
        stride = config.vae.temporal_stride
        if self.frames < 1 or (self.frames - 1) % stride:
            below = max(1, (self.frames - 1) // stride * stride + 1)
            raise InputError(f"frames {self.frames}: must be {stride}n + 1; use {below} or {below + stride}")
        if self.last_image is not None and self.frames < 2:
            raise InputError(f"frames {self.frames}: a first and a last image need more than one")
        check_name("noise", self.noise, NOISES)
        check_name("weights", self.weights, tuple(WEIGHTS))
        if not all(map(math.isfinite, as_pair(self.guidance))):
            raise InputError(f"guidance {self.guidance}: must be finite numbers")
        if config.sampling.boundary is None and self.boundary is not None:
            raise InputError(f"boundary {self.boundary:g} is between two experts but the model has one; leave it out")
        if self.boundary is not None and not 0 <= self.boundary <= 1:
            raise InputError(f"boundary {self.boundary:g}: must be from 0 to 1")
        for name in ("guidance", "solver", "schedule"):
            by_expert(name, vars(self)[name], config.experts)
        if isinstance(self.steps, tuple) and self.boundary is None:
            low, high = self.steps
            raise InputError(f"steps {low},{high} are for two experts but the model has one; give one number")
        if self.attention is not None:
            from wan_jax.kernels.attention import BACKENDS

            check_name("attention", self.attention, tuple(BACKENDS))
        if self.attention_window is not None:
            if self.attention_window < 0:
                raise InputError(f"attention_window {self.attention_window}: must not be negative")
            if self.attention == "cudnn":
                raise InputError("attention cudnn knows no attention_window; leave one of them out")
        self.make_schedule()
        if self.initial_latents is not None and self.initial_latents.shape != (needed := self.latents_shape(config)):
            raise InputError(
                f"latents have shape {self.initial_latents.shape}; {self.size[0]}x{self.size[1]} with {self.frames} "
                f"frames needs {needed}"
            )

    def check_mesh(self, config: WanConfig, mesh_spec: "MeshSpec", prompts: int | None = None) -> None:
        """Raises InputError for a mesh that the model cannot run on, or not with these choices."""
        mesh_spec.check(config, prompts=prompts)
        if self.attention_window is not None and mesh_spec.ring > 1:
            raise InputError(f"mesh {mesh_spec}: ring knows no attention_window; use ulysses, or leave the window out")

    @property
    def attention_options(self) -> "AttentionOptions":
        """How self-attention is computed."""
        from wan_jax.kernels.attention import AttentionOptions
        from wan_jax.kernels.attention.block_lists import TemporalWindow

        window = self.attention_window
        return AttentionOptions(self.attention, None if window is None else TemporalWindow(window))

    def make_schedule(self) -> Schedule:
        """The run's sigmas and timesteps; raises InputError for unknown names, steps or shift out of range."""
        return make_schedule(self.schedule, self.solver, self.steps, self.shift, self.boundary)

    def latents_shape(self, config: WanConfig) -> tuple[int, int, int, int]:
        """(C, F', h, w) of the video's latents."""
        width, height = self.size
        stride = config.vae.spatial_stride
        frames = (self.frames - 1) // config.vae.temporal_stride + 1
        return config.vae.z_dim, frames, height // stride, width // stride

    def as_json(self) -> dict[str, Any]:
        """Everything but what the video is made of: prompt, pictures and latents."""
        inputs = ("prompt", "image", "last_image", "initial_latents")
        return {each.name: vars(self)[each.name] for each in knobs(SamplingParams) if each.name not in inputs}


def read_latents(latents: Any) -> np.ndarray:
    """Latents of one video, float32 [C, F', h, w], from an array or a .npy file.

    Raises:
        InputError: no such file, an array of another kind, or numbers that are not finite.
    """
    where = "initial latents"
    if isinstance(latents, (str, os.PathLike)):
        path = path_of("latents file", latents)
        where = f"latents file {path}"
        if not path.is_file():
            raise InputError(f"{where} does not exist; give a .npy file of float32 [C, F', h, w]")
        try:
            latents = np.load(path, mmap_mode="r", allow_pickle=False)  # reads no more than there is
            latents.dtype  # noqa: B018 (an archive of arrays has none)
        except (ValueError, EOFError, OSError, AttributeError, MemoryError, OverflowError):
            raise InputError(f"{where} is not a .npy array; give float32 [C, F', h, w]") from None
        if latents.dtype != np.float32 or latents.ndim != 4:
            raise InputError(f"{where} holds {latents.dtype} of shape {latents.shape}; give float32 [C, F', h, w]")
    try:
        latents = np.array(latents, np.float32)  # a copy, which stays as it was checked
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} {latents!r:.60}: give float32 [C, F', h, w]") from None
    if not np.isfinite(latents).all():
        raise InputError(f"{where} {'holds' if 'file' in where else 'hold'} NaN or infinity; give finite numbers")
    return latents


def check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    """Raises InputError, suggesting the nearest known name, unless `name` is known."""
    if name not in known:
        raise unknown_name(what, name, known)


def _nearest_multiple(pixels: int, multiple: int) -> str:
    below = pixels // multiple * multiple
    return f"{below} or {below + multiple}" if below > 0 else str(multiple)
