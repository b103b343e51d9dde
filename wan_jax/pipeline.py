"""Prompt -> tokens -> context -> latents -> frames.

The pipeline owns the models and the order of the work. Each stage is one method, so that a caller can keep the latents
between denoising and decoding.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from wan_jax.checkpoint import Checkpoint, open_checkpoint
from wan_jax.config import WanConfig
from wan_jax.diffusion.conditioning import TEXT_ONLY, Conditioning, FirstFrame, known_frames, stack_conditioning
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.noise import initial_noise
from wan_jax.diffusion.params import DTYPES, PROFILE_NAMES, SamplingParams, check_name, documented, make_requests
from wan_jax.diffusion.relay import denoise_in_relay
from wan_jax.diffusion.segments import plan_segments
from wan_jax.diffusion.solvers import get_solvers
from wan_jax.diffusion.step import Expert
from wan_jax.errors import InputError
from wan_jax.lora import Lora, LoraFile, Loras, open_loras
from wan_jax.lora.apply import AdaptedDenoiser, adapter_bytes, with_loras
from wan_jax.media.image import Picture, clip_input, frames_to_encode, is_stretched
from wan_jax.media.video import Video, check_frames
from wan_jax.models.build import abstract_model
from wan_jax.models.compiled import CompiledModels
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.image_encoder import ImageEncoder
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parallel.placement import SINGLE, Placement
from wan_jax.parameters import with_parameters
from wan_jax.planning.mesh import Mesh, choose_placement
from wan_jax.runtime import xla_flags
from wan_jax.runtime.compiled import CompiledFunction
from wan_jax.runtime.events import Run
from wan_jax.runtime.offload import Memory
from wan_jax.runtime.progress import Bars
from wan_jax.text.tokenizer import Tokenizer

CACHED_PROMPTS = 64
CACHED_IMAGES = 8

# What the videos of one batch have in common.
SHARED = ("size", "frames", "steps", "guidance", "shift", "boundary", "solver", "schedule", "attention")


class WanPipeline:
    """Text, or text and images, to video with one model of the Wan family.

    Attributes:
        config: what the model is, and its sampling defaults.
        text_encoder, denoisers, vae, image_encoder: the models; `denoisers` by expert name, with the LoRAs on them. Few
            have an image encoder.
        loras: what `set_loras` put on the denoisers.
        placement: the devices that they run on.
        memory: moves their weights as the placement's offload profile asks.
        seconds: wall time of the last run by stage: "load", "compile", "text", "image", "encode", "denoise",
            "decode".
        latents: float32 [B, C, F', h, w] of the last run. They are kept as soon as denoising ends, so that nothing is
            lost if decoding or saving fails; None before the first run.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        tokenizer: Tokenizer,
        text_encoder: TextEncoder,
        denoisers: dict[str, Denoiser],
        vae: VAE,
        image_encoder: ImageEncoder | None = None,
        placement: Placement = SINGLE,
        programs: CompiledModels | None = None,
        progress: bool | Bars = False,
    ):
        self.config = config
        self.placement = placement
        self.memory = Memory(placement.offload, placement.devices[0])
        self.latents: np.ndarray | None = None
        self.seconds: dict[str, float] = {}
        self._bars = progress if isinstance(progress, Bars) else Bars(progress)
        self._tokenizer = tokenizer
        self.denoisers = denoisers
        self.loras: tuple[Lora, ...] = ()
        self._placements = placement.by_expert(list(denoisers))
        self._adapted = {
            name: AdaptedDenoiser(denoiser, self._placements[name].parameter_sharding)
            for name, denoiser in denoisers.items()
        }
        self.text_encoder = text_encoder
        self.vae = vae
        self.image_encoder = image_encoder
        if programs is None:
            programs = CompiledModels(exact=next(iter(denoisers.values())).dtype == jnp.float32, placement=placement)
        self._programs = programs
        self._encoded_prompts: dict[str, jax.Array] = {}
        self._encoded_images: dict[tuple[Any, ...], tuple[Conditioning, jax.Array | None]] = {}
        self._lengths_warned_of: set[int] = set()

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        dtype: str = "bfloat16",
        *,
        vae_dtype: str = "float32",
        profile: str = "auto",
        mesh: Mesh = None,
        progress: bool = False,
    ) -> "WanPipeline":
        """Loads a checkpoint: ours (Orbax), the official tree, a diffusers tree, ComfyUI files, or a hub id of those.

        Args:
            path_or_id: a local path, or "organisation/name", which huggingface_hub downloads.
            dtype: "bfloat16" or "float32", for the text encoder and the denoisers. An image encoder is always float32.
            vae_dtype: the same for the VAE, which the official code runs in float32. "bfloat16" is faster, takes half
                the memory, and moves the frames by less than one of their 255 levels on average.
            profile: where the weights are kept (runtime/offload.py): "resident", "swap" or "stream"; "auto" takes the
                first of them that the device has room for at the preset's size. On a mesh weights are resident.
            mesh: how the work is spread over the devices: "cfg2-ulysses2", {"cfg": 2, "ulysses": 2}, or "auto" for what
                suits the model, their number and their memory (wan_jax/parallel/collectives.py says what the axes are);
                None for one device.
            progress: show bars and notes on standard error.

        Raises:
            InputError: the checkpoint is missing, damaged or of another family; the message names the file or tensor.
        """
        checkpoint = open_checkpoint(path_or_id)
        return cls.from_checkpoint(
            checkpoint, dtype, vae_dtype=vae_dtype, profile=profile, mesh=mesh, progress=progress
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        dtype: str = "bfloat16",
        *,
        vae_dtype: str = "float32",
        profile: str = "auto",
        mesh: Mesh = None,
        request: SamplingParams | None = None,
        loras: Loras = (),
        progress: bool | Bars = False,
    ) -> "WanPipeline":
        """Loads the weights of a checkpoint that is already open; otherwise as `from_pretrained`.

        `request` is the run that the profile or mesh "auto" must have room for, beside `loras` (`set_loras`), which
        are verified before any weight is loaded. `progress` may be bars that are shown already.
        """
        check_name("dtype", dtype, DTYPES)
        check_name("VAE dtype", vae_dtype, DTYPES)
        check_name("profile", profile, PROFILE_NAMES)
        xla_flags.configure()
        start = time.perf_counter()
        bars = progress if isinstance(progress, Bars) else Bars(progress)
        for note in checkpoint.notes:
            bars.note(note)
        config = checkpoint.config
        if checkpoint.tokenizer_folder is None:
            raise InputError(
                f"{checkpoint.path} holds no tokenizer; put the folder of google/umt5-xxl beside its files"
            )
        tokenizer = Tokenizer.from_pretrained(checkpoint.tokenizer_folder, vocab_size=config.text_encoder.vocab_size)

        opened_loras = open_loras(loras, config)
        adapters = [adapter_bytes(each, config.denoiser) for each in opened_loras.by_expert.values()]
        run = (request or SamplingParams()).resolve(config)
        placement, programs = choose_placement(
            mesh, profile, config, run, dtype, vae_dtype, adapter_bytes=max(adapters), note=bars.note
        )
        by_expert = placement.by_expert(config.experts)

        def load(component: str, make, model_config, dtype: str):
            places = by_expert.get(component, placement).model_shardings(model_config, abstract_model(model_config))
            with bars.transfers("load") as report:
                arrays = checkpoint.load(component, dtype, places, progress=report)
            return with_parameters(lambda: make(model_config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)), arrays)

        clip = config.image_encoder
        pipeline = cls(
            config,
            tokenizer=tokenizer,
            text_encoder=load("text_encoder", TextEncoder, config.text_encoder, dtype),
            denoisers={name: load(name, Denoiser, config.denoiser, dtype) for name in config.experts},
            vae=load("vae", VAE, config.vae, vae_dtype),
            # In float32: the official code has float16 here, which bfloat16 would not match.
            image_encoder=None if clip is None else load("image_encoder", ImageEncoder, clip, "float32"),
            placement=placement,
            programs=programs,
            progress=progress,
        )
        if opened_loras.files:
            pipeline.set_loras(opened_loras)
        pipeline.seconds["load"] = time.perf_counter() - start
        return pipeline

    def with_denoisers(self, denoisers: dict[str, Denoiser]) -> "WanPipeline":
        """A pipeline with other denoisers, as training has them; all else, and what was encoded, is shared."""
        other = WanPipeline(
            self.config,
            tokenizer=self._tokenizer,
            text_encoder=self.text_encoder,
            denoisers=denoisers,
            vae=self.vae,
            image_encoder=self.image_encoder,
            placement=self.placement,
            programs=self._programs,
            progress=self._bars,
        )
        other._encoded_prompts = self._encoded_prompts
        return other

    def set_loras(self, loras: Loras) -> tuple[LoraFile, ...]:
        """Puts LoRAs on the experts, in place of those before; an empty list gives back the base, to the bit.

        Takes effect in the next run. Other scales compile nothing, and neither do other files that change the same
        parameters with the same ranks (rounded up to multiples of 16).

        Args:
            loras: safetensors files of any dialect (`Lora` also says scale and expert), added up; or open ones.

        Returns:
            The open files; `str()` and `as_json()` of each report what matched and what was ignored.

        Raises:
            InputError: a file that is no LoRA, or not for this model; the LoRAs before then stay.
        """
        opened = open_loras(loras, self.config)
        for note in opened.notes:
            self._bars.note(note)
        # The old adapters go before the new ones come.
        self.loras = ()
        self.denoisers = {name: adapted.base for name, adapted in self._adapted.items()}
        self.denoisers = with_loras(self._adapted, opened)
        self.loras = opened.loras
        return opened.files

    @overload
    def __call__(self, prompt: str | SamplingParams, *, num_videos: None = None, **params: Any) -> Video: ...

    @overload
    def __call__(
        self, prompt: str | SamplingParams | Sequence[str | SamplingParams], *, num_videos: int | None, **params: Any
    ) -> list[Video]: ...

    @overload
    def __call__(self, prompt: Sequence[str | SamplingParams], **params: Any) -> list[Video]: ...

    @documented
    def __call__(self, prompt: Any, *, num_videos: int | None = None, **params: Any) -> Video | list[Video]:
        """Generates one video, or from a list of prompts a list of videos in one batch.

        Every argument left at None takes the value of the checkpoint's preset.

        Args:
            prompt: one text or several; or SamplingParams, which have the arguments below as fields.
            num_videos: how many videos of each prompt; then the result is a list.
            **params: see SamplingParams.

        Raises:
            InputError: an argument that the model cannot serve, named with what to do.
        """
        is_single = num_videos is None and isinstance(prompt, (str, SamplingParams))
        requests = [each.resolve(self.config) for each in make_requests(prompt, params, num_videos or 1)]
        latents = self.denoise(requests)
        videos = [
            Video(
                frames=self.decode(one_latents),
                latents=one_latents,
                fps=request.fps,
                metadata=self.metadata(request),
            )
            for request, one_latents in zip(requests, latents, strict=True)
        ]
        for video in videos:
            video.seconds = dict(self.seconds)
        return videos[0] if is_single else videos

    def extend(self, video: Video, prompt: str, **choices: Any) -> Video:
        """Continues a video from its last frame, at its size and rate; returns both parts as one.

        `choices` are those of a call. "frames" counts what is generated; the first of them is the frame that both parts
        share, which is there once.

        Raises:
            InputError: a size that the model cannot do, or a model that takes no image.
        """
        following = self(prompt, **choices | {"image": video.frames[-1], "size": video.size})
        changes = {"image": "the last frame before", "fps": video.fps}
        return Video(
            frames=np.concatenate([video.frames, following.frames[1:]]),
            latents=following.latents,
            fps=video.fps,
            metadata=following.metadata | changes | {"extends": {"frames": len(video.frames), **video.metadata}},
            seconds=following.seconds,
        )

    def denoise(self, requests: Sequence[SamplingParams]) -> np.ndarray:
        """Resolved requests -> float32 latents [B, C, F', h, w], one batch."""
        settings, prompts = requests[0], [request.prompt for request in requests]
        for name in SHARED:
            if different := [request for request in requests if vars(request)[name] != vars(settings)[name]]:
                raise InputError(
                    f"{name} {vars(different[0])[name]}: videos of one call have the same {name}; make this one apart"
                )
        self.placement.mesh_spec.check(self.config, prompts=len(prompts))
        self._warn_of_length(settings.frames)
        self.seconds = {"load": self.seconds["load"]} if "load" in self.seconds else {}
        latents = jnp.stack([self._initial_latents(request) for request in requests])
        solvers = get_solvers(settings.solver)
        segments = plan_segments(settings.make_schedule(), solvers, settings.guidance, settings.boundary)
        experts = list(dict.fromkeys(segment.expert for segment in segments))
        guided = {segment.expert for segment in segments if segment.is_guided}
        encoded = self.encode_prompts([*prompts, *[request.negative_prompt for request in requests if guided]])
        positive, negative = encoded[: len(prompts)], encoded[len(prompts) :]
        encodings = [self._encode_images(request) for request in requests]
        conditioning = stack_conditioning([known for known, _ in encodings])
        rows = [each for _, each in encodings if each is not None]
        features = jnp.concatenate(rows) if rows else None
        # With experts on devices of their own, videos pass from one to the other; batches are as large as "data" asks.
        placement = self.placement
        in_relay = placement.mesh_spec.experts > 1
        batch = placement.mesh_spec.data if in_relay else len(prompts)
        if not in_relay:
            latents = placement.put_batch(latents)
            conditioning = placement.put(conditioning, placement.batch_specs(conditioning))

        with (
            self._bars.task("denoise (compiling)", total=segments[0].total * len(prompts) // batch) as bar,
            contextlib.ExitStack() as at_the_end,
            contextlib.ExitStack() as running,
        ):
            at_the_end.callback(self.memory.drop_prefetched)

            def get_expert(name: str, index: int = 0) -> Expert:
                part = slice(index * batch, (index + 1) * batch)
                running.close()  # frees the expert before this one
                denoiser = running.enter_context(self.memory.on_device(self.denoisers[name]))
                inputs: Any = [positive, negative if name in guided else None, features]
                text, opposite, image = self._placements[name].put_batch(
                    [None if x is None else x[part] for x in inputs]
                )
                return Expert.prepare(denoiser, text, opposite, image, self._placements[name])

            def on_step(step: Any) -> None:
                bar.advance(1, f"denoise ({step.expert} expert)")
                if not in_relay:
                    self._add_seconds("denoise", step.seconds)
                self._add_seconds("compile", step.compile_seconds)
                for following in experts[experts.index(step.expert) + 1 :]:
                    self.memory.prefetch(self.denoisers[following])

            if in_relay:
                lots = [latents[start : start + batch] for start in range(0, len(prompts), batch)]
                known = [
                    stack_conditioning([known for known, _ in encodings[start : start + batch]])
                    for start in range(0, len(prompts), batch)
                ]
                with self._stage("denoise"):
                    lots = denoise_in_relay(lots, segments, get_expert, Run(on_step), known)
                self.latents = np.concatenate([np.asarray(lot) for lot in lots])
            else:
                latents = denoise(latents, segments, get_expert, Run(on_step), conditioning)
                self.latents = placement.gather(latents)
        if not np.isfinite(self.latents).all():
            raise InputError("the denoised latents are not finite: the weights are damaged, or need float32")
        return self.latents

    def decode(
        self, latents: ArrayLike, *, on_frames: Callable[[np.ndarray], None] | None = None, chunk: int | None = None
    ) -> np.ndarray:
        """Latents of one video, float32 [C, F', h, w] -> frames uint8 [F, H, W, 3].

        Latent frames are decoded `chunk` at a time (None: one for each device) and leave the device as they are done,
        while the next are decoded; so memory does not grow with the length. `on_frames` is called with each lot, uint8
        [n, H, W, 3], in order.
        """
        videos = self.placement.put(np.asarray(latents)[None])
        chunk = chunk or self._programs.decode_chunk
        lots: list[np.ndarray] = []
        with (
            self._bars.task("decode", total=videos.shape[2]) as bar,
            self.memory.on_device(self.vae) as vae,
            self._stage("decode"),
        ):

            def fetch(frames: jax.Array) -> None:
                lots.append(np.asarray(frames))
                if on_frames is not None:
                    on_frames(lots[-1])

            frames, cache = self._start(self._programs.decode_first, vae, videos[:, :, :1])
            for index in range(1, videos.shape[2], chunk):
                some = videos[:, :, index : index + chunk]
                following, cache = self._start(self._programs.decode_next, vae, cache, some)
                fetch(frames)
                bar.reach(index)
                frames = following
            fetch(frames)
            bar.reach(videos.shape[2])
        return np.concatenate(lots)

    def encode(self, frames: ArrayLike) -> np.ndarray:
        """Frames of one video [F, H, W, 3] -> normalised latents, float32 [C, F', h, w]: the inverse of `decode`.

        Frames are uint8, or floats in [-1, 1], which a resize may have overshot a little. F is 4n + 1, and one frame is
        a video too; H and W are multiples of the VAE's stride. They go to the device one latent frame's worth at a
        time, while those before are encoded: memory does not grow with the length. Nothing is sampled: the latents are
        the mean of their distribution.

        The VAE's dtype is that of the pipeline (`vae_dtype`). Condition on latents from a float32 VAE: in bfloat16 they
        shift enough to be seen in what is generated.

        Raises:
            InputError: frames of another shape, dtype or range.
        """
        frames = check_frames(np.asarray(frames), self.config.vae)
        stride = self.config.vae.temporal_stride
        lots: list[np.ndarray] = []
        with (
            self._bars.task("encode", total=1 + (len(frames) - 1) // stride) as bar,
            self.memory.on_device(self.vae) as vae,
            self._stage("encode"),
        ):
            latents, cache = self._start(self._programs.encode_first, vae, self.placement.put(frames[:1]))
            for index in range(1, len(frames), stride):
                some = self.placement.put(frames[index : index + stride])
                following, cache = self._start(self._programs.encode_next, vae, cache, some)
                lots.append(np.asarray(latents))  # waits, so that no more frames are on their way to the device
                bar.reach(len(lots))
                latents = following
            lots.append(np.asarray(latents))
            bar.reach(len(lots))
        return np.concatenate(lots, axis=1)

    def metadata(self, request: SamplingParams) -> dict[str, Any]:
        """What a video's file says of its making."""
        pictures = {"image": request.image, "last_image": request.last_image}
        names = {name: picture.name for name, picture in pictures.items() if picture is not None}
        loras = {"loras": [lora.as_json() for lora in self.loras]} if self.loras else {}
        mesh = {} if self.placement.is_single else {"mesh": str(self.placement.mesh_spec)}
        return {"prompt": request.prompt, **names, "model": self.config.name, **loras, **mesh, **request.as_json()}

    def _initial_latents(self, request: SamplingParams) -> jax.Array:
        if request.initial_latents is not None:
            return jnp.asarray(request.initial_latents)
        return initial_noise(request.seed, request.latents_shape(self.config), request.noise)

    def encode_prompts(self, prompts: Sequence[str]) -> jax.Array:
        """Prompts -> [B, text_length, text_dim]; each distinct prompt is encoded once and remembered."""
        remembered = self._encoded_prompts
        encoded = {prompt: remembered[prompt] for prompt in prompts if prompt in remembered}
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in encoded]:
            with self.memory.on_device(self.text_encoder) as encoder:
                for prompt in new:
                    tokens, mask = self._tokenizer([prompt], self.config.denoiser.text_length)
                    tokens, mask = self.placement.put((tokens, mask))
                    encoded[prompt] = self._run("text", self._programs.encode_text, encoder, tokens, mask)[0]
                    remembered[prompt] = encoded[prompt]
            while len(remembered) > CACHED_PROMPTS:
                remembered.pop(next(iter(remembered)))
        return jnp.stack([encoded[prompt] for prompt in prompts])

    def _encode_images(self, request: SamplingParams) -> tuple[Conditioning, jax.Array | None]:
        """What pictures give to the denoise loop, and to attention beside the text ([1, image tokens, dim]).

        The results for the last few are remembered.
        """
        if self.config.conditioning == "text":
            return TEXT_ONLY, None
        pictures = [picture for picture in (request.image, request.last_image) if picture is not None]
        key = (*[picture.digest for picture in pictures], request.size, request.frames)
        if key not in self._encoded_images:
            if len(self._encoded_images) >= CACHED_IMAGES:
                self._encoded_images.pop(next(iter(self._encoded_images)))
            self._encoded_images[key] = self._encode_frames(request), self._encode_for_attention(pictures)
        return self._encoded_images[key]

    def _encode_frames(self, request: SamplingParams) -> Conditioning:
        if request.image is None:
            channels, _, height, width = request.latents_shape(self.config)
            return FirstFrame.unknown(channels, height, width)
        if is_stretched(self.config, request.image, request.size):
            self._bars.note("the image is stretched to another shape; without a size the video takes the image's")
        frames = frames_to_encode(self.config, request.image, request.last_image, request.size, request.frames)
        latents = jnp.asarray(self.encode(frames))[None]
        if self.config.conditioning == "first_frame":
            return FirstFrame(latents, jnp.ones(1, bool))
        known = [0] if request.last_image is None else [0, request.frames - 1]
        return known_frames(latents, known, self.config.vae.temporal_stride)

    def _encode_for_attention(self, pictures: Sequence[Picture]) -> jax.Array | None:
        if self.image_encoder is None:
            return None
        side = self.image_encoder.config.image_size
        pixels = self.placement.put(np.stack([clip_input(picture.pixels, side) for picture in pictures]))
        with self.memory.on_device(self.image_encoder) as encoder:
            features = self._run("image", self._programs.encode_image, encoder, pixels)
        return features.reshape(1, -1, features.shape[-1])  # of two images, one after the other

    def _warn_of_length(self, frames: int) -> None:
        """Says, once for each length, that the model was not trained for so many frames."""
        trained = self.config.sampling.frames
        if frames <= trained or frames in self._lengths_warned_of:
            return
        self._lengths_warned_of.add(frames)
        message = (
            f"{frames} frames are more than the {trained} that {self.config.name} was trained for: motion may repeat"
        )
        if self._bars.enabled:
            self._bars.note(message)
        else:
            warnings.warn(message, stacklevel=4)  # of the caller of a call

    def _run(self, stage: str, program: CompiledFunction, *args: Any) -> Any:
        """Runs a program to its end, counts the time under `stage` and the time to compile it under "compile"."""
        with self._stage(stage):
            return jax.block_until_ready(self._start(program, *args))

    def _start(self, program: CompiledFunction, *args: Any) -> Any:
        """Runs a program without waiting for its end; counts the time to compile it."""
        start = time.perf_counter()
        program.compile(*args)
        self._add_seconds("compile", time.perf_counter() - start)
        return program(*args)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """Counts the time that the block takes, but for compiling."""
        start, compiled = time.perf_counter(), self.seconds.get("compile", 0.0)
        yield
        compiled = self.seconds.get("compile", 0.0) - compiled
        self._add_seconds(name, time.perf_counter() - start - compiled)

    def _add_seconds(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds


def peak_bytes() -> int | None:
    """The most device memory used so far, over all devices of this process; None where the backend does not say."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)
