"""Prompt cleaning and token ids."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers

from wan_jax.config import OFFICIAL_NEGATIVE_PROMPT
from wan_jax.errors import InputError
from wan_jax.testing.tokenizer import COMMON_CHINESE, train_small_tokenizer
from wan_jax.text.tokenizer import Tokenizer, clean_prompt

TEXTS = [
    OFFICIAL_NEGATIVE_PROMPT,
    "Two anthropomorphic cats in comfy boxing gear and bright gloves fight intensely on a spotlighted stage.",
    "夕阳下的海边，一只白色的猫坐在冲浪板上。",  # noqa: RUF001
]
PROMPTS = [
    *TEXTS,
    "",
    "a",
    "Two cats,  12345 &amp; more\u3000gloves  ",
    "«naïve» 龘 🦊 \u201cquoted\u201d",
]


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "tokenizer"
    train_small_tokenizer(TEXTS, 400, folder)
    return folder


@pytest.fixture(scope="module")
def sentencepiece_tokenizer(tmp_path_factory) -> Path:
    """A folder with spiece.model alone, trained as UMT5's was: unigram, byte pieces, no <s>."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts.txt"),
        model_prefix=str(folder / "spiece"),
        model_type="unigram",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder


CLEANED = [
    ("静止，整体发灰，最差", "静止,整体发灰,最差"),  # noqa: RUF001  full-width commas
    ("一只猫。跑、跳！Ｗａｎ２．２", "一只猫。跑、跳!Wan2.2"),  # noqa: RUF001  these two stops stay
    ("\u201ca\u201d \u2018b\u2019", "\"a\" 'b'"),
    ("cats &amp; dogs", "cats & dogs"),
    ("cats &amp;amp; dogs <b>", "cats & dogs <b>"),  # twice, also where ftfy leaves HTML alone
    ("a\u3000b\t\n c\u00a0\u2003d", "a b c d"),
    (" \u3000 a  b \n", "a b"),
    ("&nbsp;a&nbsp;&nbsp;b", "a b"),
    ("â€œMojibakeâ€\x9d", '"Mojibake"'),
    ("Kept Case, kept-dashes — 4K", "Kept Case, kept-dashes — 4K"),
    ("", ""),
]


@pytest.mark.quick
@pytest.mark.parametrize(("text", "cleaned"), CLEANED)
def test_clean_prompt(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_negative_prompt_has_ascii_commas():
    cleaned = clean_prompt(OFFICIAL_NEGATIVE_PROMPT)
    assert cleaned.startswith("色调艳丽,过曝,静态,")
    assert len(cleaned) == len(OFFICIAL_NEGATIVE_PROMPT)
    assert OFFICIAL_NEGATIVE_PROMPT.count("\uff0c") == cleaned.count(",") > 20


@pytest.mark.quick
def test_pads_and_masks(small_tokenizer):
    tokens, mask = Tokenizer.from_pretrained(small_tokenizer)(["Two cats", "", "海边"])
    assert tokens.shape == mask.shape == (3, 512)
    assert tokens.dtype == mask.dtype == np.int32
    lengths = mask.sum(axis=1)
    np.testing.assert_array_equal(mask, np.arange(512) < lengths[:, None])
    assert not np.any(tokens[mask == 0])
    np.testing.assert_array_equal(tokens[np.arange(3), lengths - 1], 1)  # </s>
    assert lengths[1] == 1  # an empty prompt is </s> alone
    assert lengths[2] == 4  # the space mark, two characters, </s>
    assert not np.any(tokens[mask == 1] == 2)  # nothing unknown


def test_no_prompts(small_tokenizer):
    tokens, mask = Tokenizer.from_pretrained(small_tokenizer)([])
    assert tokens.shape == mask.shape == (0, 512)


def test_truncates_and_still_ends(small_tokenizer):
    tokenizer = Tokenizer.from_pretrained(small_tokenizer)
    long = "Two cats fight " * 600
    tokens, mask = tokenizer([long])
    assert mask.all()
    assert tokens[0, -1] == 1
    assert np.all(tokens[0, :-1] > 2)
    np.testing.assert_array_equal(tokenizer([long], length=20)[0][0, :19], tokens[0, :19])
    # The longest prompt that fits: 511 tokens and </s>.
    exact, exact_mask = tokenizer(["cats " * 511])
    assert exact_mask.all()
    np.testing.assert_array_equal(tokenizer(["cats " * 512])[0], exact)


def test_prompts_are_cleaned(small_tokenizer):
    tokenizer = Tokenizer.from_pretrained(small_tokenizer)
    tokens, _ = tokenizer(["Two\u3000cats\uff0c &amp;amp; gloves ", "Two cats, & gloves"])
    np.testing.assert_array_equal(tokens[0], tokens[1])


@pytest.mark.parametrize("loader", ["AutoTokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast"])
def test_transformers_reads_the_small_tokenizer(small_tokenizer, loader):
    original = getattr(transformers, loader).from_pretrained(small_tokenizer, local_files_only=True)
    assert len(original) == 400
    assert (original.pad_token_id, original.eos_token_id, original.unk_token_id) == (0, 1, 2)
    expected = original([clean_prompt(text) for text in PROMPTS], padding="max_length", max_length=512, truncation=True)
    tokens, mask = Tokenizer.from_pretrained(small_tokenizer)(PROMPTS)
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"])


def test_spiece_model_alone(sentencepiece_tokenizer):
    """As AutoTokenizer converts it; on text without unknown characters that is SentencePiece's own result."""
    original = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_tokenizer / "spiece.model"))
    tokens, mask = Tokenizer.from_pretrained(sentencepiece_tokenizer)(TEXTS)
    for row, length, text in zip(tokens, mask.sum(axis=1), TEXTS, strict=True):
        assert row[:length].tolist() == [*original.encode(clean_prompt(text)), 1]
    converted = transformers.T5TokenizerFast.from_pretrained(sentencepiece_tokenizer, local_files_only=True)
    expected = converted([clean_prompt(text) for text in PROMPTS], padding="max_length", max_length=512)["input_ids"]
    np.testing.assert_array_equal(Tokenizer.from_pretrained(sentencepiece_tokenizer)(PROMPTS)[0], expected)


def test_folder_saved_by_transformers(sentencepiece_tokenizer, tmp_path):
    original = transformers.T5TokenizerFast.from_pretrained(sentencepiece_tokenizer, local_files_only=True)
    original.save_pretrained(tmp_path)
    tokens, _ = Tokenizer.from_pretrained(tmp_path)(PROMPTS)
    expected, _ = Tokenizer.from_pretrained(sentencepiece_tokenizer)(PROMPTS)
    np.testing.assert_array_equal(tokens, expected)


def test_tokenizer_json_is_taken_at_its_word(small_tokenizer, tmp_path):
    """transformers 5 would put its own pre-tokenizer in place of this one."""
    content = json.loads((small_tokenizer / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "never",
        "split": True,
    }
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((small_tokenizer / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with_mark, _ = Tokenizer.from_pretrained(small_tokenizer)(["Two cats"])
    without_mark, mask = Tokenizer.from_pretrained(tmp_path)(["Two cats"])
    expected = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("Two cats").ids
    assert without_mark[0, : mask.sum()].tolist() == expected
    assert np.any(without_mark != with_mark)


def test_runs_without_torch_and_without_a_word(small_tokenizer, sentencepiece_tokenizer):
    program = (
        "import sys; sys.modules['torch'] = None\n"  # import torch now fails
        "from wan_jax.text.tokenizer import Tokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    Tokenizer.from_pretrained(folder)(['Two cats'])\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(small_tokenizer), str(sentencepiece_tokenizer)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_tokenizer_of_another_model(small_tokenizer, tmp_path):
    """One with more tokens than the embedding has rows, with far fewer, or that does not end prompts as UMT5's."""
    Tokenizer.from_pretrained(small_tokenizer, vocab_size=400)(PROMPTS)
    for rows in (200, 256384):
        with pytest.raises(InputError, match=rf"the text encoder {rows}; use the one"):
            Tokenizer.from_pretrained(small_tokenizer, vocab_size=rows)
    content = json.loads((small_tokenizer / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": None}))
    with pytest.raises(InputError, match="not UMT5's"):
        Tokenizer.from_pretrained(tmp_path)


def test_ids_beyond_the_embedding(small_tokenizer):
    backend = tokenizers.Tokenizer.from_file(str(small_tokenizer / "tokenizer.json"))
    with pytest.raises(InputError, match=r"gave id \d+ but the text encoder has 50 tokens"):
        Tokenizer(backend, vocab_size=50)(PROMPTS)


def test_the_fingerprint_tells_tokenizers_apart(small_tokenizer, tmp_path):
    train_small_tokenizer(["another"], 300, tmp_path)
    one, other = (Tokenizer.from_pretrained(folder) for folder in (small_tokenizer, tmp_path))
    assert one.fingerprint != other.fingerprint
    assert one.fingerprint == Tokenizer.from_pretrained(small_tokenizer).fingerprint


def test_bad_folders(small_tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"tokenizer folder .*missing does not exist"):
        Tokenizer.from_pretrained(tmp_path / "missing")
    with pytest.raises(InputError, match=r"holds neither tokenizer.json nor spiece.model"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(InputError, match="cannot be read") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_small_tokenizer_is_deterministic(small_tokenizer, tmp_path):
    train_small_tokenizer(iter(TEXTS), 400, tmp_path)
    names = {path.name for path in small_tokenizer.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (small_tokenizer / name).read_bytes()


def test_small_tokenizer_vocabulary(tmp_path):
    assert (len(COMMON_CHINESE), COMMON_CHINESE[0], COMMON_CHINESE[-1]) == (3755, "啊", "座")
    train_small_tokenizer(TEXTS, 4200, tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path, vocab_size=4200)
    unseen = ["一位老人骑着自行车穿过下雨的街道", "An old man rides a bicycle, 100% rain!", *TEXTS]
    tokens, _ = tokenizer(unseen)
    assert not np.any(tokens == 2)
    assert len({tuple(row) for row in tokens}) == len(unseen)
    train_small_tokenizer(TEXTS, 98, tmp_path)
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size() == 98
    with pytest.raises(InputError, match="vocabulary of 98 or more, not 97"):
        train_small_tokenizer(TEXTS, 97, tmp_path)
