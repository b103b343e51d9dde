"""A small tokenizer in the format of UMT5's, for tests and demo checkpoints: nothing to download."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import regex
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from wan_jax.errors import InputError
from wan_jax.text.tokenizer import END_TOKEN, PAD_TOKEN, clean_prompt

UNKNOWN_TOKEN = "<unk>"
SPECIAL_TOKENS = (PAD_TOKEN, END_TOKEN, UNKNOWN_TOKEN)  # ids 0, 1, 2 as in every T5
SPACE = "▁"  # SentencePiece's mark for the start of a word

PRINTABLE_ASCII = "".join(map(chr, range(33, 127)))
# The 3755 characters of everyday Chinese: level 1 of GB 2312.
COMMON_CHINESE = b"".join(
    bytes((row, cell)) for row in range(0xB0, 0xD8) for cell in range(0xA1, 0xFA if row == 0xD7 else 0xFF)
).decode("gb2312")


def train_small_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json of a unigram tokenizer.

    Its pieces are, as far as `vocab_size` goes: ASCII, the characters of `texts`, their English words and common
    Chinese characters. The same arguments give the same files. `wan_jax.text.tokenizer.Tokenizer` and transformers'
    AutoTokenizer and T5TokenizerFast read them and agree.

    Raises:
      InputError: `vocab_size` has no room for ASCII.
    """
    texts = [clean_prompt(text) for text in texts]
    characters = Counter(character for text in texts for character in text if not character.isspace())
    words = Counter(SPACE + word for text in texts for word in regex.findall(r"[A-Za-z]{2,}", text))
    candidates = [
        SPACE,
        *PRINTABLE_ASCII,
        *(character for character, _ in characters.most_common()),
        *(word for word, _ in words.most_common()),
        *COMMON_CHINESE,
    ]
    pieces = list(dict.fromkeys(candidates))[: vocab_size - len(SPECIAL_TOKENS)]
    if len(pieces) <= len(PRINTABLE_ASCII):
        minimum = len(SPECIAL_TOKENS) + 1 + len(PRINTABLE_ASCII)
        raise InputError(f"a small tokenizer needs a vocabulary of {minimum} or more, not {vocab_size}")

    counts = characters + words
    total = counts.total() + len(pieces)
    scores = [(piece, math.log((counts[piece] + 1) / total)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram([(token, 0.0) for token in SPECIAL_TOKENS] + scores, unk_id=2))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    # Exactly what transformers 5 builds for a T5 tokenizer whatever tokenizer.json says, so that all readers agree.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END_TOKEN}", pair=f"$A {END_TOKEN} $B {END_TOKEN}", special_tokens=[(END_TOKEN, 1)]
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": PAD_TOKEN, "eos_token": END_TOKEN, "unk_token": UNKNOWN_TOKEN}
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512, **names}
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
