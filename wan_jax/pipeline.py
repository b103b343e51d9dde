"""Prompt -> text -> latents -> frames: the pipeline owns the models and the order of the work."""

import copy
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from wan_jax.checkpoint import Checkpoint, open_checkpoint
from wan_jax.checkpoint.load import load_models, load_tokenizer
from wan_jax.config import WanConfig
from wan_jax.diffusion.params import DTYPES, PROFILE_NAMES, SamplingParams, check_name
from wan_jax.diffusion.state import SamplingState
from wan_jax.fields import documented
from wan_jax.generation.extension import extended, extension
from wan_jax.generation.pictures import PictureEncoder
from wan_jax.generation.requests import check_together, make_requests
from wan_jax.generation.sampler import Result, Sampler
from wan_jax.generation.weight_formats import WeightFormats
from wan_jax.lora import Lora, LoraFile, Loras, open_loras
from wan_jax.lora.apply import AdaptedDenoiser, adapter_bytes, with_loras
from wan_jax.media.codec import Codec
from wan_jax.media.video import Video
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.image_encoder import ImageEncoder
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parallel.placement import SINGLE, Placement
from wan_jax.planning.mesh import Mesh, choose_placement
from wan_jax.runtime import xla_flags
from wan_jax.runtime.events import CancelToken, Listener, Run, listeners
from wan_jax.runtime.offload import Memory
from wan_jax.runtime.progress import Bars
from wan_jax.text.encoder import PromptEncoder
from wan_jax.text.tokenizer import Tokenizer


class WanPipeline:
    """Text, or text and images, to video with one model of the Wan family.

    One pipeline may be used from several threads: what belongs to a call is nowhere but in its results.

    Attributes:
        config: what the model is, and its sampling defaults.
        text_encoder, denoisers, vae, image_encoder: the models; `denoisers` by expert name, with the LoRAs on them. Few
            have an image encoder.
        loras: what `set_loras` put on the denoisers.
        placement, memory: the devices that they run on; moves their weights as its offload profile asks.
        codec: the VAE at work.
        on_event: told of every run's events, beside the run's own listener.
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
        on_event: Listener | None = None,
    ):
        self.config = config
        self.placement = placement
        self.memory = Memory(placement.offload, placement.devices[0])
        self.on_event = on_event
        self.tokenizer, self.text_encoder, self.vae, self.image_encoder = tokenizer, text_encoder, vae, image_encoder
        parts = self.memory, placement
        self.codec = Codec(vae, text_encoder.embedding.dtype == jnp.float32, *parts)
        self._prompts = PromptEncoder(tokenizer, text_encoder, config.denoiser.text_length, *parts)
        self._pictures = PictureEncoder(config, self.codec, image_encoder, *parts)
        self._use(denoisers)

    def _use(self, denoisers: dict[str, Denoiser]) -> None:
        self.denoisers = denoisers
        self._formats = WeightFormats(self.placement)
        self.loras: tuple[Lora, ...] = ()
        self._changing = threading.Lock()
        placements = self.placement.by_expert(list(denoisers))
        self._adapted = {
            name: AdaptedDenoiser(denoiser, placements[name].parameter_sharding) for name, denoiser in denoisers.items()
        }

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike | None = None,
        dtype: str = "bfloat16",
        *,
        vae_dtype: str = "float32",
        profile: str = "auto",
        mesh: Mesh = None,
        progress: bool = False,
    ) -> "WanPipeline":
        """Loads a checkpoint: ours (Orbax), the official tree, a diffusers tree, ComfyUI files, or a hub id of those.

        On GPUs call `wan_jax.configure()` first: it lets JAX use more of their memory, and of the host's.

        Args:
            path_or_id: a local path, or a hub id ("organisation/name"), which is downloaded; None for nano.
            dtype: "bfloat16" or "float32", for the text encoder and the denoisers. An image encoder is always float32.
            vae_dtype: the same for the VAE. "bfloat16" is faster, takes half the memory, and moves the frames by less
                than one of their 255 levels on average.
            profile: where the weights are kept (runtime/offload.py): "resident", "swap" or "stream"; "auto" takes the
                first of them that the device has room for at the preset's size. On a mesh weights are resident.
            mesh: axes of devices and their sizes: "cfg2-ulysses2", {"cfg": 2, "ulysses": 2}, or "auto" for what suits
                the model and the devices (wan_jax/parallel/collectives.py lists the axes); None for one device.
            progress: show bars and notes on standard error.

        Raises:
            InputError: the checkpoint is missing, damaged or of another family; the message names the file or tensor.
        """
        checkpoint, on_event = open_checkpoint(path_or_id), Bars() if progress else None
        return cls.from_checkpoint(
            checkpoint, dtype, vae_dtype=vae_dtype, profile=profile, mesh=mesh, on_event=on_event
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
        on_event: Listener | None = None,
    ) -> "WanPipeline":
        """Loads the weights of a checkpoint that is already open, as `from_pretrained` does.

        Args:
            request: the run that the profile or mesh "auto" must have room for.
            loras: see `set_loras`; they are verified before any weight is loaded.
            on_event: told of loading, and of all that the pipeline does.
        """
        check_name("dtype", dtype, DTYPES)
        check_name("VAE dtype", vae_dtype, DTYPES)
        check_name("profile", profile, PROFILE_NAMES)
        run, config = Run(on_event), checkpoint.config
        for note in (*checkpoint.notes, *xla_flags.notes()):
            run.note(note)
        opened_loras = open_loras(loras, config)
        adapters = [adapter_bytes(each, config.denoiser) for each in opened_loras.by_expert.values()]
        request = (request or SamplingParams()).resolve(config)
        placement = choose_placement(
            mesh, profile, config, request, dtype, vae_dtype, adapter_bytes=max(adapters), note=run.note
        )
        parts: Any = {"tokenizer": load_tokenizer(checkpoint), "placement": placement}
        parts |= load_models(checkpoint, None, dtype, vae_dtype, placement, run)
        parts["denoisers"] = {name: parts.pop(name) for name in config.experts}
        pipeline = cls(config, on_event=on_event, **parts)
        if opened_loras.files:
            pipeline.set_loras(opened_loras)
        return pipeline

    def with_denoisers(self, denoisers: dict[str, Denoiser]) -> "WanPipeline":
        """A pipeline with other denoisers, as training has them; all else, and what was encoded, is shared."""
        other = copy.copy(self)
        other._use(denoisers)
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
            Run(self.on_event).note(note)
        with self._changing:
            self.denoisers, self.loras = {name: adapted.base for name, adapted in self._adapted.items()}, ()
            self._formats.clear()  # the old adapters go before the new ones come
            self.denoisers, self.loras = with_loras(self._adapted, opened), opened.loras
        return opened.files

    @overload
    def __call__(self, prompt: str | SamplingParams, *, num_videos: None = None, **params: Any) -> Video: ...

    @overload
    def __call__(
        self, prompt: str | SamplingParams | Sequence[str | SamplingParams], *, num_videos: int | None, **params: Any
    ) -> list[Video]: ...

    @overload
    def __call__(self, prompt: Sequence[str | SamplingParams], **params: Any) -> list[Video]: ...

    @documented(SamplingParams)
    def __call__(
        self,
        prompt: Any,
        *,
        num_videos: int | None = None,
        on_event: Listener | None = None,
        cancel: CancelToken | None = None,
        state: SamplingState | None = None,
        **params: Any,
    ) -> Video | list[Video]:
        """Generates one video, or from a list of prompts a list of videos in one batch.

        Every argument left at None takes the value of the checkpoint's preset. In a batch seed, negative_prompt, image,
        last_image and initial_latents may be sequences, one value for each video; one seed counts up.

        Args:
            prompt: one text or several; or SamplingParams, whose fields are the arguments below.
            num_videos: how many videos of each prompt; then the result is a list.
            on_event: called with each event of the run (runtime/events.py): steps, notes, decoded frames.
            cancel: a token that ends the run from another thread.
            state: of this call, from `StepDone.state()`, also in another process; the result is the same to the bit.
            **params: see SamplingParams.

        Raises:
            InputError: an argument that the model cannot serve, named with what to do.
            Cancelled: the token asked for it. Nothing of the run stays on the device.
        """
        requests = make_requests(prompt, params, 1 if num_videos is None else num_videos)
        videos = [each.video() for each in self.results(requests, on_event=on_event, cancel=cancel, state=state)]
        return videos[0] if num_videos is None and isinstance(prompt, (str, SamplingParams)) else videos

    def results(
        self,
        requests: Sequence[SamplingParams],
        *,
        on_event: Listener | None = None,
        cancel: CancelToken | None = None,
        state: SamplingState | None = None,
    ) -> Iterator[Result]:
        """Denoises the requests as one batch and yields the result of each; see `__call__` for arguments and errors."""
        requests = [request.resolve(self.config) for request in make_requests(requests, {})]
        check_together(requests)
        requests[0].check_mesh(self.config, self.placement.mesh_spec, len(requests))
        run = Run(listeners(self.on_event, on_event), cancel)
        with self._changing:  # what files say of LoRAs is what runs
            denoisers = self._formats.get(self.denoisers, requests[0].weights)
            metadata = [self.metadata(request) for request in requests]
        parts = denoisers, self.memory, self.placement, self.codec.preview
        latents, attention = Sampler(self.config, self._prompts, self._pictures, *parts).denoise(requests, run, state)
        for index, (request, about) in enumerate(zip(requests, metadata, strict=True)):
            yield Result(request, latents[index], about | {"attention_used": attention}, index, self.codec, run)

    def extend(self, video: Video, prompt: str, **params: Any) -> Video:
        """Continues a video from its last frame; returns both parts as one, at its size and rate.

        `params` are those of a call; "frames" counts what is generated at the model's rate, the shared frame included.
        The video's own frames stay. What follows gets its size, and its rate: the frame that shows at each time.

        Raises:
            InputError: a size that the model cannot do, or a model that takes no image.
        """
        run = {name: params.pop(name) for name in ("on_event", "cancel", "state") if name in params}
        request = extension(video, SamplingParams(prompt, **params), self.config)
        (result,) = self.results([request], **run)
        return extended(video, result, self.config.sampling.fps)

    def decode(self, latents: ArrayLike, *, chunk: int | None = None) -> np.ndarray:
        """Latents of one video, float32 [C, F', h, w] -> frames uint8 [F, H, W, 3]; see `Codec.decode`."""
        return np.concatenate(list(self.codec.decode(latents, Run(self.on_event), chunk=chunk)))

    def encode(self, frames: ArrayLike) -> np.ndarray:
        """Frames of one video [F, H, W, 3] -> normalised latents, float32 [C, F', h, w]: the inverse of `decode`.

        Frames are uint8, or floats in [-1, 1], which a resize may have overshot a little; F is 4n + 1, H and W are
        multiples of the VAE's stride. The latents are the mean of their distribution. Condition on latents from a
        float32 VAE (`vae_dtype`): in bfloat16 they shift enough to be seen in what is generated.

        Raises:
            InputError: frames of another shape, dtype or range.
        """
        return self.codec.encode(frames, Run(self.on_event))

    def encode_prompts(self, prompts: Sequence[str]) -> jax.Array:
        """Prompts -> [B, text_length, text_dim]; each is encoded once and remembered."""
        return self._prompts.encode(prompts, Run(self.on_event))

    def metadata(self, request: SamplingParams) -> dict[str, Any]:
        """What the file of a resolved request's video says of its making."""
        names = {name: x.name for name in ("image", "last_image") if (x := vars(request)[name]) is not None}
        loras = {"loras": [lora.as_json() for lora in self.loras]} if self.loras else {}
        mesh = {} if self.placement.is_single else {"mesh": str(self.placement.mesh_spec)}
        names |= {} if request.initial_latents is None else {"initial_latents": "given"}
        return {"prompt": request.prompt, **names, "model": self.config.name, **loras, **mesh, **request.as_json()}
