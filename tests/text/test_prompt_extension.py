"""Prompt extension against a real server on this machine and a small random language model."""

import contextlib
import http.server
import json
import sys
import threading
from collections.abc import Iterator

import pytest

from wan_jax.errors import InputError
from wan_jax.text.prompt_extension import (
    Endpoint,
    Extension,
    extend_prompt,
    open_language_model,
    system_prompt,
)

pytestmark = pytest.mark.quick


class Server(http.server.ThreadingHTTPServer):
    """Answers each request with the next of `answers`, the last one for ever: (status, body), or None for silence."""

    def __init__(self, *answers: tuple[int, bytes] | None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.requests: list[dict] = []
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        index = min(len(self.server.requests), len(self.server.answers) - 1)
        self.server.requests.append({"path": self.path, "headers": dict(self.headers), "body": json.loads(body)})
        answer = self.server.answers[index]
        if answer is None:
            self.server.released.wait(10)
            return
        self.send_response(answer[0])
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(answer[1])))
        self.end_headers()
        self.wfile.write(answer[1])

    do_GET = do_POST

    def log_message(self, *args) -> None:
        pass


@contextlib.contextmanager
def serve(*answers: tuple[int, bytes] | None) -> Iterator[Server]:
    with Server(*answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def completion(content: object) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


def endpoint(server: Server, key: str | None = None, timeout: float = 60) -> Endpoint:
    return Endpoint(server.url, "small", key, timeout=timeout, attempts=2, pause=0.0)


def test_endpoint():
    with serve(completion("A red circle moves slowly to the right.")) as server:
        extension = extend_prompt("a red circle", "t2v", endpoint(server, "secret"))
    assert extension == Extension("a red circle", "A red circle moves slowly to the right.", None)
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["headers"]["Authorization"] == "Bearer secret"
    assert set(request["body"]) == {"model", "messages"}
    assert request["body"]["model"] == "small"
    system, user = request["body"]["messages"]
    assert system == {"role": "system", "content": system_prompt("a red circle", "t2v")}
    assert user == {"role": "user", "content": "a red circle"}


def test_no_key_no_header():
    with serve(completion("longer")) as server:
        extend_prompt("short", "t2v", endpoint(server))
    assert "Authorization" not in server.requests[0]["headers"]


@pytest.mark.parametrize(
    ("reply", "prompt"),
    [
        ("  Two\nlines.  ", "Two lines."),
        ('"In quotation marks."', "In quotation marks."),
        ("“一段描述。”", "一段描述。"),
        ('"EXIT" is what the sign says, and "OPEN"', '"EXIT" is what the sign says, and "OPEN"'),
        ("<think>The user wants\na circle.</think>\nA circle.", "A circle."),
    ],
)
def test_replies_are_cleaned(reply, prompt):
    with serve(completion(reply)) as server:
        assert extend_prompt("a circle", "t2v", endpoint(server)).prompt == prompt


def test_a_busy_server_is_asked_again():
    with serve((503, b"busy"), completion("longer")) as server:
        assert extend_prompt("short", "t2v", endpoint(server)).prompt == "longer"
    with serve(None, completion("longer")) as server:
        assert extend_prompt("short", "t2v", endpoint(server, timeout=2)).prompt == "longer"
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("answer", "requests", "failure"),
    [
        ((500, b"broken"), 2, "answers 500 Internal Server Error (2 attempts)"),
        ((429, b"slow down"), 2, "answers 429"),
        ((401, b"no key"), 1, "answers 401 Unauthorized"),
        ((302, b""), 1, "answers 302 Found"),  # neither prompt nor key goes where the server points
        (None, 2, "timed out"),
        ((200, b"<html>"), 1, "the answer is no chat completion: b'<html>'"),
        ((200, b"\xff\xfe\x00"), 1, "no chat completion"),
        ((200, b"[]"), 1, "no chat completion"),
        ((200, b'{"choices": []}'), 1, "no chat completion"),
        ((200, b'{"error": "quota"}'), 1, "no chat completion"),
        (completion(None), 1, "the answer holds no text: None"),
        (completion("  \n"), 1, "the answer is empty"),
        (completion("<think>Hm.</think>"), 1, "the answer is empty"),
        (completion("<think>The user wants"), 1, "the answer ends within the model's thoughts"),
        (completion("word " * 4000), 1, "the answer has 19999 characters"),
    ],
    ids=str,
)
def test_on_failure_the_original_is_used(answer, requests, failure):
    with serve(answer) as server:
        client = endpoint(server, "secret", timeout=0.3 if answer is None else 60)
        extension = extend_prompt("a red circle", "t2v", client)
    assert extension.prompt == extension.original == "a red circle"
    assert failure in extension.failure
    assert "\n" not in extension.failure
    assert "secret" not in extension.failure
    assert len(server.requests) == requests


def test_no_server():
    with serve(completion("x")) as server:
        url = server.url
    extension = extend_prompt("a", "t2v", Endpoint(url, "small", attempts=1))
    assert (extension.prompt, "refused" in extension.failure) == ("a", True)


def test_the_language_and_the_task_choose_the_system_prompt():
    prompts = {(task, text): system_prompt(text, task) for task in ("t2v", "i2v") for text in ("a dog", "一只狗")}
    assert len(set(prompts.values())) == 4
    for (task, text), prompt in prompts.items():
        assert ("中文" in prompt) == (text == "一只狗")
        assert ("cannot see" in prompt or "看不到" in prompt) == (task == "i2v")
        assert "{" not in prompt
    for text, chinese in (
        ("一个穿着NIKE的女孩", True),
        ('a sign that says "茶馆"', False),
        ("猫が道を歩く", False),
        ("", False),
        ("🙂", False),
    ):
        assert ("中文" in system_prompt(text, "t2v")) == chinese, text


def test_transformers_is_missing(tmp_path, monkeypatch):
    for name in ("torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install transformers torch"):
        open_language_model(None, str(tmp_path), "OPENAI_API_KEY")


@pytest.mark.parametrize(
    ("url", "model", "message"),
    [
        (None, None, "--extend-prompt needs --extend-url URL and --extend-model NAME, or --extend-model FOLDER"),
        (None, "nowhere", "nowhere is no folder"),
        ("http://localhost/v1", None, "--extend-prompt needs --extend-model NAME"),
        ("localhost:8000", "small", "give a URL like http://localhost:8000/v1"),
        ("file:///etc/passwd", "small", "give a URL like"),
        ("http://[::1", "small", "give a URL like"),
        ("http://host:port/", "small", "give a URL like"),
    ],
)
def test_bad_options(url, model, message, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match=message) as error:
        open_language_model(url, model, "OPENAI_API_KEY")
    assert "\n" not in str(error.value)


def test_url_and_key_from_the_environment(monkeypatch):
    with serve(completion("longer")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
        monkeypatch.setenv("MY_KEY", "secret")
        assert extend_prompt("short", "i2v", open_language_model(None, "small", "MY_KEY")).prompt == "longer"
    assert server.requests[0]["headers"]["Authorization"] == "Bearer secret"
    monkeypatch.setenv("MY_KEY", "sec\nret")
    with pytest.raises(InputError, match="the API key") as error:
        open_language_model(None, "small", "MY_KEY")
    assert "sec" not in str(error.value)
