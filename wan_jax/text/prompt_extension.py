"""Prompt extension: a language model turns a short prompt into the detailed kind that the video models were trained on.

The language model is the user's: any endpoint with OpenAI's chat completions, or a transformers folder on this machine.
Nothing is sent anywhere unless a run asks for it.
"""
# ruff: noqa: RUF001 (Chinese punctuation)

import http.client
import json
import os
import pathlib
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wan_jax.errors import InputError

MAX_REPLY_BYTES = 1 << 20
MAX_CHARACTERS = 4000  # several times what 512 tokens hold: whatever is longer is no prompt
MAX_NEW_TOKENS = 512

_ENGLISH = """You write prompts for a model that makes videos of five seconds. Rewrite what the user asks for as one
 paragraph of 80 to 120 English words, in plain present tense.
{task}
Say who or what is seen, the setting, what moves and how from beginning to end, the light and colours, the visual style,
 and what the camera does and from how near. Keep every subject, number, name, colour and style that the user gives, and
 copy text that is to appear in the picture exactly, in quotation marks. Write nothing that five seconds cannot show, no
 sounds, no thoughts, no cuts. Answer with the paragraph alone: no title, no list, no comment."""

_CHINESE = """你为一个生成五秒视频的模型撰写提示词。请把用户的要求改写成一段 80 到 150 字的中文描述，语言平实具体。
{task}
写明主体、环境、从开始到结束的动作与变化、光线与色彩、画面风格，以及景别和镜头运动。用户给出的主体、数量、名称、颜色和风格必须全部保留；
画面中要出现的文字须原样照抄并加引号。不写五秒内无法呈现的内容，不写声音、心理活动或镜头切换。只输出这一段描述，不要标题、列表或解释。"""

_TASKS = {
    ("t2v", "en"): "The video is made from your text alone, so add fitting details where the user leaves them open.",
    ("t2v", "zh"): "视频完全由这段文字生成，用户没有说明的地方，请补充合理的细节。",
    (
        "i2v",
        "en",
    ): "The video starts from a picture that you cannot see. Describe the motion, how things "
    "change and the camera; do not invent how people, objects or the place look beyond what the user says.",
    (
        "i2v",
        "zh",
    ): "视频从一张你看不到的图片开始。请着重描写动作、变化和镜头运动；除用户所说之外，不要臆造人物、物体或场景的外观。",
}


class ExtensionError(Exception):
    """The language model gave nothing that can be used."""


@dataclass(frozen=True)
class Extension:
    """What became of a prompt."""

    original: str
    prompt: str  # the original where the language model failed
    failure: str | None = None  # why it failed, in one line


def extend_prompt(prompt: str, task: str, ask: Callable[[str, str], str]) -> Extension:
    """Asks the language model for a detailed version of the prompt, in the prompt's language (Chinese or English).

    Args:
        prompt: what the user wrote.
        task: "t2v" or "i2v".
        ask: an `Endpoint`, a `LocalModel`, or any function of (system prompt, prompt) that gives the model's answer, or
            raises ExtensionError.

    Returns:
        The extended prompt, or the original with the reason; a failing language model is no error.
    """
    try:
        return Extension(prompt, _clean(ask(system_prompt(prompt, task), prompt)))
    except ExtensionError as error:
        return Extension(prompt, prompt, " ".join(str(error).split()))


def system_prompt(prompt: str, task: str) -> str:
    """What the language model is told to do with the prompt: in Chinese for a Chinese prompt, else in English."""
    language = "zh" if _is_chinese(prompt) else "en"
    text = (_CHINESE if language == "zh" else _ENGLISH).format(task=_TASKS[task, language])
    return text.replace("\n ", " ")


def open_language_model(url: str | None, model: str | None, key_variable: str) -> "Endpoint | LocalModel":
    """The language model that the options name.

    Args:
        url: base URL of an OpenAI-compatible endpoint, for example http://localhost:8000/v1; by default the
            environment's OPENAI_BASE_URL, unless `model` is a folder.
        model: the model's name at the endpoint, or without a URL the folder of a transformers model.
        key_variable: the environment variable that holds the API key. Keys are no options: other users can see those.

    Raises:
        InputError: neither is given, the URL is none, the folder does not exist, or transformers is not installed.
    """
    if url is None and model is not None and pathlib.Path(model).is_dir():
        return LocalModel(pathlib.Path(model))
    url = url or os.environ.get("OPENAI_BASE_URL")
    if url is None:
        given = "" if model is None else f": {model} is no folder"
        raise InputError(
            f"--extend-prompt needs --extend-url URL and --extend-model NAME, or --extend-model FOLDER{given}"
        )
    if model is None:
        raise InputError(f"--extend-prompt needs --extend-model NAME: which model of {url}")
    return Endpoint(url, model, os.environ.get(key_variable))


class Endpoint:
    """A model behind OpenAI's chat completions, as vLLM, llama.cpp, Ollama and most services speak it."""

    def __init__(
        self,
        url: str,
        model: str,
        key: str | None = None,
        *,
        timeout: float = 120.0,
        attempts: int = 3,
        pause: float = 2.0,
    ):
        """
        Args:
            url: up to and without /chat/completions.
            model: its name there.
            key: sent as a bearer token.
            timeout: seconds without a byte after which an attempt has failed.
            attempts: how often to try where the server is busy, broken or silent.
            pause: seconds before the second attempt, doubled before every other.

        Raises:
            InputError: the URL is not one of http or https, or the key cannot be sent.
        """
        if not _is_url(url):
            raise InputError(f"--extend-url {url}: give a URL like http://localhost:8000/v1")
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise InputError("the API key for --extend-url holds spaces, line ends or signs that no header can carry")
        self.url = url.rstrip("/") + "/chat/completions"
        self.model = model
        self._key = key
        self._timeout, self._attempts, self._pause = timeout, attempts, pause
        # Elsewhere is not where the user wanted prompt and key to go.
        self._opener = urllib.request.build_opener(_NoRedirects)

    def __call__(self, system: str, prompt: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        # No temperature, no limit: there are endpoints that refuse either.
        body = json.dumps({"model": self.model, "messages": messages}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(self.url, body, headers, method="POST")
        for attempt in range(1, self._attempts + 1):
            try:
                with self._opener.open(request, timeout=self._timeout) as reply:
                    return _content(reply.read(MAX_REPLY_BYTES))
            except urllib.error.HTTPError as error:
                failure = f"{self.url} answers {error.code} {error.reason}"
                if error.code != 429 and error.code < 500:  # asking again would not help
                    raise ExtensionError(failure) from error
            except (OSError, http.client.HTTPException) as error:  # refused, unknown host, timeout, broken off
                failure = f"{self.url}: {getattr(error, 'reason', None) or error or type(error).__name__}"
            if attempt < self._attempts:
                time.sleep(self._pause * 2 ** (attempt - 1))
        raise ExtensionError(f"{failure} ({self._attempts} attempts)")

    def close(self) -> None:
        """Nothing is held between prompts."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class LocalModel:
    """A causal language model of transformers, on a GPU where PyTorch has one. It is loaded for the first prompt."""

    def __init__(self, folder: pathlib.Path):
        """Raises InputError where transformers or PyTorch is missing."""
        try:
            import torch
            import transformers
        except ImportError as error:
            raise InputError(
                f"--extend-model {folder}: a local model needs {error.name}; pip install transformers torch"
            ) from None
        self.folder = folder
        self._torch, self._transformers = torch, transformers
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, system: str, prompt: str) -> str:
        try:
            return self._answer(system, prompt)
        except Exception as error:  # whatever PyTorch and a folder of files can do
            raise ExtensionError(f"{self.folder}: {error}") from error

    def close(self) -> None:
        """Gives the model's memory back."""
        self._loaded = None
        if self._torch.cuda.is_available():
            self._torch.cuda.empty_cache()

    def _answer(self, system: str, prompt: str) -> str:
        tokenizer, model = self._load()
        if tokenizer.chat_template:
            messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        else:
            text = f"{system}\n\n{prompt}\n\n"
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
        with self._torch.inference_mode():
            # Greedy, so that a run can be repeated.
            output = model.generate(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
            )
        return tokenizer.decode(output[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            tokenizer = self._transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model: Any = self._transformers.AutoModelForCausalLM.from_pretrained(
                self.folder, local_files_only=True, dtype="auto"
            )
            self._loaded = tokenizer, model.to("cuda" if self._torch.cuda.is_available() else "cpu").eval()
        return self._loaded


def _is_url(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket left open
        return False


def _content(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise ExtensionError(f"the answer is no chat completion: {body[:80]!r}") from None
    if not isinstance(content, str):
        raise ExtensionError(f"the answer holds no text: {content!r}")
    return content


def _clean(reply: str) -> str:
    """One line, without a reasoning model's thoughts and without quotation marks around the whole."""
    text = re.sub(r"<think>.*?</think>", "", reply, flags=re.DOTALL)
    if "<think>" in text:
        raise ExtensionError("the answer ends within the model's thoughts")
    text = " ".join(text.split())
    if match := re.fullmatch(r"[\"“]([^\"“”]*)[\"”]", text):
        text = match[1].strip()
    if not text:
        raise ExtensionError("the answer is empty")
    if len(text) > MAX_CHARACTERS:
        raise ExtensionError(f"the answer has {len(text)} characters; a prompt has some hundred")
    return text


def _is_chinese(text: str) -> bool:
    """More Chinese characters than Latin letters, and none that only Japanese has."""
    chinese, latin = (len(re.findall(pattern, text)) for pattern in (r"[\u4e00-\u9fff]", r"[A-Za-z]"))
    return chinese > latin and not re.search(r"[\u3040-\u30ff]", text)
