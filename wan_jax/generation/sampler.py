"""One batch of requests becomes latents, and each of them a result."""

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.config import PerExpert, WanConfig
from wan_jax.diffusion.conditioning import stack_conditioning
from wan_jax.diffusion.experts import as_pair
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.noise import initial_noise
from wan_jax.diffusion.params import SamplingParams
from wan_jax.diffusion.relay import denoise_in_relay
from wan_jax.diffusion.segments import plan_segments
from wan_jax.diffusion.solvers import get_solvers
from wan_jax.diffusion.state import Preview, SamplingState
from wan_jax.diffusion.step import Expert
from wan_jax.errors import InputError, check_finite
from wan_jax.generation.pictures import PictureEncoder
from wan_jax.media.codec import Codec
from wan_jax.media.video import Video
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.placement import Placement
from wan_jax.planning.report import advice
from wan_jax.runtime.events import Event, Run, StepDone
from wan_jax.runtime.offload import Memory
from wan_jax.text.encoder import PromptEncoder


@dataclass(frozen=True, eq=False)
class Result:
    """What became of one request. Its frames are decoded when they are asked for.

    Attributes:
        request: resolved.
        latents: float32 [C, F', h, w], normalised, as the denoiser left them.
        metadata: what a file says of the video's making.
        index: which video of the batch it is.
    """

    request: SamplingParams
    latents: np.ndarray
    metadata: dict[str, Any]
    index: int
    _codec: Codec
    _run: Run

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall time of the batch so far: "text", "image", "encode", "denoise", "decode", and "compile" beside them."""
        return self._run.seconds

    def frames(self) -> Iterator[np.ndarray]:
        """Yields the frames, uint8 [n, H, W, 3], while later ones are decoded."""
        return self._codec.decode(self.latents, self._run, video=self.index)

    def video(self) -> Video:
        """All of the video."""
        frames = np.concatenate(list(self.frames()))
        return Video(frames, self.latents, self.request.fps, self.metadata, dict(self.seconds))


@dataclass(frozen=True, eq=False)
class Sampler:
    """Denoises batches with the parts of a pipeline."""

    config: WanConfig
    prompts: PromptEncoder
    pictures: PictureEncoder
    denoisers: Mapping[str, Denoiser]
    memory: Memory
    placement: Placement
    preview: Preview

    def denoise(
        self, requests: Sequence[SamplingParams], run: Run, state: SamplingState | None = None
    ) -> tuple[np.ndarray, str]:
        """Resolved requests that may be made together -> float32 latents [B, C, F', h, w], and the attention that ran.

        With a `state` the run goes on from there.
        """
        first, count, mesh_spec = requests[0], len(requests), self.placement.mesh_spec
        if state is not None:
            if not isinstance(state, SamplingState):
                raise InputError(f"state {state!r:.80}: must be a SamplingState; read a file by SamplingState.load")
            shape, needed = state.arrays.latents.shape, (count, *first.latents_shape(self.config))
            if shape != needed:
                raise InputError(f"the sampling state has latents of shape {shape}; these videos need {needed}")
        dtype = jnp.dtype(next(iter(self.denoisers.values())).dtype).name
        run.advice = functools.partial(advice, self.config, first, dtype, self.placement)
        if first.frames > (trained := self.config.sampling.frames):
            fact = f"{first.frames} frames are more than the {trained} that {self.config.name} was trained for"
            run.note(f"{fact}: motion may repeat")
        low, high = zip(*[as_pair(request.guidance) for request in requests], strict=True)
        guidance: Any = first.guidance
        if len({*low}) > 1 or len({*high}) > 1:
            guidance = PerExpert(low=list(low), high=list(high))
            if mesh_spec.experts > 1:
                raise InputError("guidance differs between videos, which experts on devices of their own cannot do")
        segments = plan_segments(first.make_schedule(), get_solvers(first.solver), guidance, first.boundary)
        experts = list(dict.fromkeys(segment.expert for segment in segments))
        guided = {segment.expert for segment in segments if segment.is_guided}
        prompts = [request.prompt for request in requests]
        encodings = self.prompts.encode([*prompts, *[request.negative_prompt for request in requests if guided]], run)
        encoded = [self.pictures.encode(request, run) for request in requests]
        features = [each for _, each in encoded if each is not None]
        rows: Any = encodings[:count], encodings[count:], jnp.concatenate(features) if features else None

        # With experts on devices of their own, videos pass from one to the other; batches are as large as "data" asks.
        size = mesh_spec.data if mesh_spec.experts > 1 else count
        batches = [slice(start, start + size) for start in range(0, count, size)]
        known = [stack_conditioning([each for each, _ in encoded[batch]]) for batch in batches]
        digests = [_digest(requests[batch]) for batch in batches]
        begin: list[Any] = [state] if state is not None else [self._initial_latents(requests[each]) for each in batches]
        placements = self.placement.by_expert(list(self.denoisers))
        attention: set[str] = set()

        def get_expert(name: str, index: int = 0) -> Expert:
            running.close()  # frees the expert before this one
            denoiser = running.enter_context(self.memory.on_device(self.denoisers[name]))
            inputs = rows[0], rows[1] if name in guided else None, rows[2]
            parts = [None if x is None else x[batches[index]] for x in inputs]
            text, negative, image = placements[name].put_batch(parts)
            denoiser = denoiser.with_attention(first.attention_options)
            expert = Expert.prepare(denoiser, text, negative, image, placements[name])
            attention.add(expert.attention_used((len(text), *first.latents_shape(self.config))))
            return expert

        def prefetch(event: Event) -> None:
            if isinstance(event, StepDone):
                for following in experts[experts.index(event.expert) + 1 :]:
                    self.memory.prefetch(self.denoisers[following])

        with (
            run.stage("denoise", (segments[0].total - (state.step if state is not None else 0)) * len(batches)),
            contextlib.ExitStack() as at_the_end,
            contextlib.ExitStack() as running,
        ):
            at_the_end.callback(self.memory.drop_prefetched)
            common = segments, get_expert, run.listened_to(prefetch)
            if mesh_spec.experts > 1:
                made = denoise_in_relay(begin, *common, known, self.preview, digests)
                latents = np.concatenate([np.asarray(each) for each in made])
            else:
                conditioning = self.placement.put(known[0], self.placement.batch_specs(known[0]))
                begin = begin if state is not None else self.placement.put_batch(begin)
                latents = self.placement.gather(denoise(begin.pop(), *common, conditioning, self.preview, *digests))
        check_finite(np.isfinite(latents).all(), "the denoised latents")
        return latents, "+".join(sorted(attention))

    def _initial_latents(self, requests: Sequence[SamplingParams]) -> jax.Array:
        shape = requests[0].latents_shape(self.config)
        return jnp.stack(
            [
                initial_noise(request.seed, shape, request.noise)
                if request.initial_latents is None
                else jnp.asarray(request.initial_latents)
                for request in requests
            ]
        )


def _digest(requests: Sequence[SamplingParams]) -> str:
    """What resolved requests say of the videos, but for what changes no more than roundings."""
    digest = hashlib.sha256()
    for each in requests:
        pictures = [picture and picture.digest for picture in (each.image, each.last_image)]
        fields = each.as_json() | {"prompt": each.prompt, "images": pictures, "fps": None, "attention": None}
        digest.update(repr(fields).encode())
        digest.update(b"" if each.initial_latents is None else each.initial_latents.tobytes())
    return digest.hexdigest()
