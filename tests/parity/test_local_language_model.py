"""Prompt extension by a small random language model, which transformers runs on PyTorch."""

import pytest
import tokenizers
import torch
import transformers

from wan_jax.text import prompt_extension
from wan_jax.text.prompt_extension import LocalModel, extend_prompt, open_language_model


@pytest.fixture(scope="module")
def local_model(tmp_path_factory):
    """A random causal language model whose vocabulary is a dozen words."""
    folder = tmp_path_factory.mktemp("language_model")
    words = [
        "[PAD]",
        "[UNK]",
        *["a", "red", "circle", "blue", "square", "moves", "slowly", "to", "the", "right", "dog"],
    ]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_positions=1024, n_embd=16, n_layer=1, n_head=2, pad_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_local_model(local_model, monkeypatch):
    monkeypatch.setattr(prompt_extension, "MAX_NEW_TOKENS", 8)
    model = open_language_model(None, str(local_model), "OPENAI_API_KEY")
    extension = extend_prompt("a red circle", "t2v", model)
    assert extension.failure is None
    assert 1 <= len(extension.prompt.split()) <= 8
    assert extension == extend_prompt("a red circle", "t2v", model)  # greedy
    assert extension != extend_prompt("a blue dog to the right", "t2v", model)


def test_local_model_with_a_chat_template(local_model, tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_extension, "MAX_NEW_TOKENS", 4)
    transformers.GPT2LMHeadModel.from_pretrained(local_model).save_pretrained(tmp_path)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(local_model)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr(
        transformers.PreTrainedTokenizerFast,
        "apply_chat_template",
        lambda self, messages, **kwargs: seen.append([m["role"] for m in messages]) or "a red circle",
    )
    assert extend_prompt("a", "t2v", LocalModel(tmp_path)).failure is None
    assert seen == [["system", "user"]]


def test_a_folder_that_is_no_model(tmp_path):
    extension = extend_prompt("a red circle", "t2v", open_language_model(None, str(tmp_path), "OPENAI_API_KEY"))
    assert extension.prompt == "a red circle"
    assert str(tmp_path) in extension.failure
    assert "\n" not in extension.failure
