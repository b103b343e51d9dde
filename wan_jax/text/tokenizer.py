"""Prompts to token ids: the official text cleaning, then UMT5's SentencePiece vocabulary."""

import hashlib
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import regex
import tokenizers

from wan_jax.errors import InputError

WORD = r"[A-Za-z]{2,}|[^\W_A-Za-z]"
PAD_TOKEN, END_TOKEN = "<pad>", "</s>"  # ids 0 and 1
SPARE_ROWS = 1024


def clean_prompt(text: str) -> str:
    """Repairs a prompt as the official code does before tokenizing (wan/modules/tokenizers.py).

    ftfy turns full-width punctuation and letters into ASCII and mends broken encodings; HTML entities are resolved
    twice; every run of Unicode whitespace becomes one space.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip()


def check_whole(folder: Path) -> None:
    """Raises InputError where tokenizer.json is cut off. Reading all of UMT5's takes a second; this reads its end."""
    file = folder / "tokenizer.json"
    if file.is_file():
        with file.open("rb") as content:
            content.seek(max(file.stat().st_size - 64, 0))
            if not content.read().rstrip().endswith(b"}"):
                raise InputError(f"{file}: truncated; fetch it again")


class Tokenizer:
    """UMT5's tokenizer: cleans prompts, ends each with </s>, and pads with id 0 to a fixed length."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        name: str = "the tokenizer",
        vocab_size: int | None = None,
        words: Iterable[str] = (),
    ):
        """Wraps a `tokenizers.Tokenizer`.

        Args:
          backend: UMT5's vocabulary; it ends each prompt with </s>.
          name: what error messages call it.
          vocab_size: rows of the text encoder's embedding; ids beyond them are refused.
          words: all that the model was trained on, where they are few; none says nothing.
        """
        self._backend = backend
        self._name = name
        self._vocab_size = vocab_size
        self._words = frozenset(words)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, vocab_size: int | None = None) -> "Tokenizer":
        """Reads a local folder that holds tokenizer.json or, failing that, spiece.model.

        Raises:
          InputError: no such folder, neither file in it, or a file that cannot be read.
        """
        folder = Path(folder)
        name = f"the tokenizer in {folder}"
        if not folder.is_dir():
            raise InputError(f"tokenizer folder {folder} does not exist; give the folder that holds tokenizer.json")
        if (folder / "tokenizer.json").is_file():
            read = _read_tokenizer_json
        elif (folder / "spiece.model").is_file():
            read = _convert_sentencepiece
        else:
            raise InputError(f"{folder} holds neither tokenizer.json nor spiece.model; copy UMT5's tokenizer into it")
        try:
            backend = read(folder)
        except ModuleNotFoundError as error:
            raise InputError(
                f"{name} has spiece.model only, which needs {error.name}; install wan_jax[sentencepiece]"
            ) from error
        except Exception as error:  # both libraries raise bare Exception for a damaged file
            raise InputError(f"{name} cannot be read ({' '.join(str(error).split())}); fetch it again") from error
        words = folder / "words.txt"
        known = words.read_text(encoding="utf-8").split() if words.is_file() else ()
        tokenizer = cls(backend, name=name, vocab_size=vocab_size, words=known)
        tokenizer._check()
        return tokenizer

    def _check(self) -> None:
        """Raises InputError for a tokenizer of another model."""
        rows, size = self._vocab_size, self._backend.get_vocab_size()
        ids = [self._backend.token_to_id(token) for token in (PAD_TOKEN, END_TOKEN)]
        if ids != [0, 1] or self._backend.encode("a").ids[-1:] != [1]:
            problem = f"it is not UMT5's: it does not end prompts with {END_TOKEN}, id 1, or pad with {PAD_TOKEN}, id 0"
        # An embedding has rows to spare; small models' tokenizers need not be full.
        elif rows is not None and not size <= rows <= max(2 * size, SPARE_ROWS):
            problem = f"it has {size} tokens and the text encoder {rows}"
        else:
            return
        raise InputError(f"{self._name} is of another model: {problem}; use the one that came with the text encoder")

    @property
    def fingerprint(self) -> str:
        """A hash of all that it does to a text."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def count_cut(self, prompt: str, length: int = 512) -> int:
        """How many tokens of a prompt are beyond the first `length`."""
        self._backend.enable_truncation(length)
        over = self._backend.encode(clean_prompt(prompt)).overflowing
        return sum(encoding.special_tokens_mask.count(0) for encoding in over)

    def unknown_words(self, prompt: str) -> list[str]:
        """The words (of scripts without spaces: the characters) that the model was not trained on, if that is known."""
        found = regex.findall(WORD, clean_prompt(prompt)) if self._words else []
        return [word for word in dict.fromkeys(found) if word not in self._words]

    def __call__(self, prompts: Sequence[str], length: int = 512) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes a batch of prompts.

        Args:
          prompts: texts, which are cleaned first; an empty one gives </s> alone.
          length: tokens per prompt; longer prompts are cut, and still end with </s>.

        Returns:
          tokens [B, length] int32, and mask [B, length] int32: 1 for tokens (</s> included), 0 for padding.

        Raises:
          InputError: an id at or beyond `vocab_size`.
        """
        self._backend.enable_truncation(length)
        self._backend.enable_padding(length=length, pad_id=0, pad_token=PAD_TOKEN)
        encodings = [self._backend.encode(clean_prompt(prompt)) for prompt in prompts]
        shape = (len(prompts), length)
        tokens = np.array([encoding.ids for encoding in encodings], np.int32).reshape(shape)
        mask = np.array([encoding.attention_mask for encoding in encodings], np.int32).reshape(shape)
        if self._vocab_size is not None and tokens.max(initial=0) >= self._vocab_size:
            raise InputError(
                f"{self._name} gave id {tokens.max()} but the text encoder has {self._vocab_size} tokens; "
                "use the tokenizer that came with the text encoder"
            )
        return tokens, mask


def _read_tokenizer_json(folder: Path) -> tokenizers.Tokenizer:
    # Not through transformers: releases 5 rebuild a T5 tokenizer from its vocabulary and drop what tokenizer.json says
    # about spaces and normalisation, which gives other ids than the official run (transformers 4) got from this file.
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def _convert_sentencepiece(folder: Path) -> tokenizers.Tokenizer:
    """What AutoTokenizer makes of a folder with spiece.model alone."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # conversion notes about special tokens
    try:
        loader = transformers.T5TokenizerFast  # type: ignore[attr-defined]  # releases 5 keep the name as an alias
        return loader.from_pretrained(folder, local_files_only=True).backend_tokenizer
    finally:
        transformers.logging.set_verbosity(verbosity)
