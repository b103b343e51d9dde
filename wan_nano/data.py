"""Scenes with their captions as tokens, written by processes beside the training one."""

import concurrent.futures
import multiprocessing
from collections.abc import Generator
from pathlib import Path

import numpy as np

from wan_jax.testing.tokenizer import train_small_tokenizer
from wan_jax.text.tokenizer import Tokenizer
from wan_nano.captions import LANGUAGES, write_captions
from wan_nano.scenes import Scenes, draw_scenes

CHUNK = 2048  # scenes made at once
KANA = "".join(map(chr, (*range(0x3041, 0x3097), *range(0x30A1, 0x30FB), 0x30FC)))
TOKENIZER_SCENES = 4000
TEST_SEED = 2**31  # training's seeds stay below


def train_tokenizer(folder: str | Path, vocab_size: int) -> None:
    """Writes the nano model's tokenizer: the grammar's characters and words, the kana, and common Chinese."""
    texts = []
    for held_out in (False, True):
        scenes = draw_scenes(TEST_SEED - 1, TOKENIZER_SCENES)
        captions = write_captions(scenes, TEST_SEED - 1, held_out_frames=held_out)
        texts += [caption.text for row in captions for caption in row]
    train_small_tokenizer([*texts, KANA], vocab_size, folder)


def make_chunk(seed: int, tokenizer_folder: str | Path, length: int, number: int = CHUNK) -> dict[str, np.ndarray]:
    """Scenes and their captions: the same for the same seed, wherever it is made.

    Returns:
      "tokens" [N, languages, length] int32, "mask" likewise, "names_background" [N, languages] bool, and the arrays of
      `Scenes`.
    """
    scenes = draw_scenes(seed, number)
    captions = write_captions(scenes, seed)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    tokens, mask = tokenizer([caption.text for row in captions for caption in row], length)
    shape = (number, len(LANGUAGES), length)
    names = np.array([[caption.names_background for caption in row] for row in captions])
    arrays = {"tokens": tokens.reshape(shape), "mask": mask.reshape(shape), "names_background": names}
    return {**arrays, **scenes.as_dict()}


def scenes_of(chunk: dict[str, np.ndarray]) -> Scenes:
    return Scenes(**{name: chunk[name] for name in Scenes.__dataclass_fields__})


def chunks(
    start: int, tokenizer_folder: str | Path, length: int, workers: int, number: int = CHUNK
) -> Generator[dict[str, np.ndarray], None, None]:
    """Chunks start, start + 1, ..., without end, in order; `workers` processes make them ahead (0: made when asked)."""
    if workers == 0:
        while True:
            yield make_chunk(start, tokenizer_folder, length, number)
            start += 1
    # Spawned, not forked: the process that asks runs JAX's threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as executor:
        ahead = [executor.submit(make_chunk, start + n, tokenizer_folder, length, number) for n in range(2 * workers)]
        try:
            while True:
                yield ahead.pop(0).result()
                start += 1
                ahead.append(executor.submit(make_chunk, start + len(ahead), tokenizer_folder, length, number))
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
