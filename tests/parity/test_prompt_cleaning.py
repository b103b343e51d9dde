"""Prompt cleaning against diffusers."""

from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from tests.text.test_tokenizer import CLEANED, PROMPTS
from wan_jax.text.tokenizer import clean_prompt


def test_clean_prompt_agrees_with_diffusers_everywhere():
    """Over every character of the Basic Multilingual Plane, alone between letters."""
    characters = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
    text = "".join(f"x{character}y" for character in characters)
    assert clean_prompt(text) == prompt_clean(text)
    for prompt in [*PROMPTS, *(text for text, _ in CLEANED)]:
        assert clean_prompt(prompt) == prompt_clean(prompt)
