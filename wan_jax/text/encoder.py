"""Prompts as the denoiser reads them: tokenized, encoded once, remembered."""

import functools
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from wan_jax.errors import InputError, check_finite
from wan_jax.fields import texts
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.parallel.placement import Placement
from wan_jax.parallel.sharding import state_specs
from wan_jax.runtime.compiled import CompiledFunction
from wan_jax.runtime.events import Run
from wan_jax.runtime.offload import Memory
from wan_jax.runtime.xla_flags import TEXT_ENCODER_OPTIONS
from wan_jax.text.tokenizer import Tokenizer

CACHED_PROMPTS = 64


class PromptEncoder:
    """Encodes prompts with one text encoder, to `length` tokens each; the last few are remembered."""

    def __init__(self, tokenizer: Tokenizer, model: TextEncoder, length: int, memory: Memory, placement: Placement):
        self.model = model
        self._tokenizer, self._length = tokenizer, length
        self._memory, self._placement = memory, placement
        self._remembered: dict[str, jax.Array] = {}
        self._lock = threading.RLock()  # a listener may use the pipeline

    def encode(self, prompts: Sequence[str], run: Run) -> jax.Array:
        """Prompts -> [B, length, dim]; each distinct one is encoded once."""
        if not (prompts := texts("prompts", prompts)):
            raise InputError("no prompts: give at least one")
        with self._lock:
            remembered = self._remembered
            encoded = {prompt: remembered[prompt] for prompt in prompts if prompt in remembered}
            if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in encoded]:
                with self._memory.on_device(self.model) as model, run.stage("text"):
                    for prompt in new:
                        run.check()
                        tokens = self._placement.put(self._tokenizer([prompt], self._length))
                        text = run.call(encode_text_function(self._placement), model, *tokens)
                        check_finite(jnp.isfinite(text).all(), "the text encoder's embeddings")
                        encoded[prompt] = remembered[prompt] = jax.block_until_ready(text)[0]
                        self._note(prompt, run)
                while len(remembered) > CACHED_PROMPTS:
                    remembered.pop(next(iter(remembered)))
            return jnp.stack([encoded[prompt] for prompt in prompts])

    def _note(self, prompt: str, run: Run) -> None:
        """Says what of a prompt the model cannot know."""
        if cut := self._tokenizer.count_cut(prompt, self._length):
            run.note(f"prompt {prompt!r:.40}: the model reads {self._length} tokens; the last {cut} are cut")
        if unknown := self._tokenizer.unknown_words(prompt):
            run.note(f"the model was never trained on {', '.join(map(repr, unknown))}: what it makes of them is chance")


@functools.cache
def encode_text_function(placement: Placement) -> CompiledFunction:
    """(encoder, tokens, mask), [B, length] each -> text [B, length, dim]; on a mesh each device has a part of it."""

    def encode_text(encoder: TextEncoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        graphdef, state = nnx.split(encoder)

        def encode(state: nnx.State, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, state)(tokens, mask)

        parts = placement.for_text(encoder.config)
        return parts.run(encode, (state_specs(state), P(), P()), P())(state, tokens, mask)

    return CompiledFunction(encode_text, compiler_options=TEXT_ENCODER_OPTIONS)
