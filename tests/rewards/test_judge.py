"""A server on this machine plays the endpoint."""

import base64
import io
import json
import math
import re
import socketserver
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dmdr_rewards
import numpy as np
import pytest
import torch
from dmdr_rewards.cli import main
from dmdr_rewards.judges import judge, reading
from PIL import Image

Reply = tuple[int, dict[str, str], bytes]


class Endpoint(ThreadingHTTPServer):
    """Answers with `play(body)`, and remembers what came in and how much of it at once."""

    def __init__(self, play: Callable[[dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.play = play
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append({**self.headers, "path": self.path})
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
        status, headers, content = self.server.play(body)
        with self.server.lock:
            self.server.busy -= 1
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client has stopped waiting
            pass

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(play: Callable[[dict[str, Any]], Reply]) -> Iterator[Endpoint]:
    server = Endpoint(play)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def says(text: str, likely: dict[str, float] | None = None) -> Reply:
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if likely is not None:
        alternatives = [{"token": token, "logprob": math.log(share)} for token, share in likely.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "top_logprobs": alternatives}]}
    return 200, {}, json.dumps({"choices": [choice]}).encode()


def in_turn(*replies: Reply) -> Callable[[dict[str, Any]], Reply]:
    remaining = iter(replies)
    return lambda body: next(remaining)


def sent_picture(body: dict[str, Any]) -> np.ndarray:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def sent_question(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][1]["text"]


def grey(*values: int) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 5, 4) / 255


def create(name: str, url: str, **options: Any) -> Any:
    return dmdr_rewards.create(name, checkpoint="some-vlm", url=url, **{"backoff": 0.01, **options})


def test_vqascore_is_the_probability_of_yes() -> None:
    play = in_turn(says("Yes", {"Yes": 0.5, " yes": 0.2, "No": 0.2, "Yesterday": 0.1}), says("No", {"No": 0.9}))
    with serving(play) as server:
        reward = create("vqascore", server.url, concurrency=1)
        scores = [reward.score(grey(0), ["a {red} cat"]), reward.score(grey(255), ["b"])]
    torch.testing.assert_close(torch.cat(scores), torch.tensor([0.7, 0.0]))
    assert [each.dtype for each in scores] == [torch.float32] * 2
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["logprobs"]) == ("some-vlm", 0, True)
    assert sent_question(body) == 'Does this figure show "a {red} cat"? Please answer yes or no.'
    assert server.headers[0]["path"] == "/v1/chat/completions"
    assert "Authorization" not in server.headers[0]


def test_vqascore_without_logprobs_is_zero_or_one() -> None:
    with serving(in_turn(says("Yes, it does."), says("no"), says("Perhaps"))) as server:
        reward = create("vqascore", server.url, concurrency=1, fallback=0.25)
        with pytest.warns(UserWarning, match="no logprobs"):
            assert reward.score(grey(0, 0, 0), ["a", "b", "c"]).tolist() == [1.0, 0.0, 0.25]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("7", 7.0),
        ("Rating: 8.5/10.", 8.5),
        ("**9** out of 10", 9.0),
        ("10", 10.0),
        ("10/10", 10.0),
        ("11", None),
        ("-3", None),
        ("between 3 and 5", None),
        ("I cannot rate this picture.", None),
        ("", None),
    ],
)
def test_ratings_are_read_or_refused(answer: str, score: float | None) -> None:
    assert judge.Rating("some-vlm", "http://localhost").read(answer, [], "a cat") == score


def test_an_answer_that_cannot_be_read_names_itself_or_takes_the_fallback() -> None:
    with serving(lambda body: says("lovely")) as server:
        with pytest.raises(ValueError, match=r"vlm-judge: no score in the answer 'lovely'.*'a cat'.*fallback="):
            create("vlm-judge", server.url).score(grey(0), ["a cat"])
        scores = create("vlm-judge", server.url, fallback=math.nan).score(grey(0), ["a cat"])
    assert scores.shape == (1,)
    assert scores.isnan().all()


def test_scores_keep_the_order_of_the_pictures_and_concurrency_has_its_limit() -> None:
    def slow_for_dark_pictures(body: dict[str, Any]) -> Reply:
        shade = int(sent_picture(body)[0, 0, 0])
        time.sleep(0.05 if shade < 4 else 0.01)
        return says(str(shade))

    with serving(slow_for_dark_pictures) as server:
        scores = create("vlm-judge", server.url, concurrency=3).score(grey(*range(10)), ["a"] * 10)
    assert scores.tolist() == list(range(10))
    assert server.most == 3


@pytest.mark.parametrize("form", ["tensor", "between two levels", "uint8", "array", "list of PIL and tensors"])
def test_every_form_of_picture_arrives_as_it_is(form: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
    forms: dict[str, Any] = {
        "tensor": tensor / 255,
        "between two levels": (tensor - 0.4).clamp(min=0) / 255,
        "uint8": tensor,
        "array": array,
        "list of PIL and tensors": [Image.fromarray(array[0]), tensor[1] / 255],
    }
    with serving(lambda body: says("1")) as server:
        create("vlm-judge", server.url, concurrency=1).score(forms[form], ["a", "b"])
    assert [sent_picture(body).tolist() for body in server.bodies] == array.tolist()


@pytest.mark.parametrize(
    "failure",
    [
        (429, {}, b"slow down"),
        (503, {}, b""),
        (200, {}, b"{not json"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"[1]"),
        (200, {}, b'{"choices": [3]}'),
        (200, {}, b"[" * 100_000),
        (200, {}, b" " * (1 << 22) + b" 1"),
        (200, {}, b"\xff\xfe"),
    ],
)
def test_passing_failures_are_tried_again(failure: Reply) -> None:
    with serving(in_turn(failure, failure, says("4"))) as server:
        assert create("vlm-judge", server.url).score(grey(0), ["a"]).tolist() == [4.0]
    assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[2]


def test_the_waits_double_and_the_endpoint_may_ask_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    busy: Reply = (429, {}, b"")
    replies = [busy, busy, (429, {"Retry-After": "7"}, b""), (429, {"Retry-After": "9999"}, b""), says("4")]
    with serving(in_turn(*replies)) as server:
        reward = create("vlm-judge", server.url, backoff=0.5)
        monkeypatch.setattr("dmdr_rewards.judges.endpoint.time.sleep", waits.append)
        assert reward.score(grey(0), ["a"]).tolist() == [4.0]
    assert waits == [0.5, 1.0, 7.0, 60.0]


def test_an_endpoint_that_stays_silent_is_given_up() -> None:
    release = threading.Event()

    def hang(body: dict[str, Any]) -> Reply:
        release.wait(10)
        return says("1")

    with serving(hang) as server:
        begin = time.perf_counter()
        with pytest.raises(ConnectionError, match=r"failed 5 times, last with .*timed out"):
            create("vlm-judge", server.url, timeout=0.1, retries=4).score(grey(0), ["a"])
        assert time.perf_counter() - begin < 4
        release.set()
    assert len(server.bodies) == 5


def test_nobody_there_is_given_up() -> None:
    with serving(lambda body: says("1")) as server:
        url = server.url
    with pytest.raises(ConnectionError, match=r"failed 3 times.*refused.*is it up"):
        create("vlm-judge", url, retries=2).score(grey(0), ["a"])


def test_a_refused_request_is_not_repeated_and_stops_the_others() -> None:
    refused = pytest.raises(ValueError, match=r"refuses the request: 404 .*no model some-vlm")
    with serving(lambda body: (404, {}, b"no model some-vlm")) as server, refused:
        create("vlm-judge", server.url, concurrency=1).score(grey(*range(20)), ["a"] * 20)
    assert len(server.bodies) < 5


def test_the_key_is_sent_to_the_endpoint_and_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    with serving(in_turn(says("1"), (401, {}, b"wrong key sk-secret"))) as server:
        reward = create("vlm-judge", server.url, api_key_env="JUDGE_KEY", retries=0)
        reward.score(grey(0), ["a"])
        assert server.headers[0]["Authorization"] == "Bearer sk-secret"
        assert "sk-secret" not in f"{reward.info}{reward!r}{reward._model!r}{server.bodies}"
        with pytest.raises(ValueError, match=r"401 .*wrong key \*\*\*"):
            reward.score(grey(0), ["a"])
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="api_key_env JUDGE_KEY: that environment variable is not set"):
        create("vlm-judge", server.url, api_key_env="JUDGE_KEY")
    for mistaken in ("sk-proj-abcdef", "AIzaSyabcdef", ""):
        with pytest.raises(ValueError, match=r"^api_key_env is not the name of a variable") as caught:
            create("vlm-judge", server.url, api_key_env=mistaken)
        assert not mistaken or mistaken not in str(caught.value)
    with pytest.raises(ValueError, match=r"^url has a query") as caught:
        create("vlm-judge", f"{server.url}?code=abcdef")
    assert "abcdef" not in str(caught.value)


DOWN = "http://127.0.0.1:1/v1"  # nothing listens on port 1
FAILURES: dict[str, tuple[str, Callable[[dict[str, Any]], Reply] | None]] = {
    "down": ("refused", None),
    "an error": ("503 ", lambda body: (503, {}, b"busy")),
    "garbage": ("not an answer of chat completions", lambda body: (200, {}, b"<html>")),
    "no JSON of this API": ("KeyError: 'choices'", lambda body: (200, {}, b'{"error": "overloaded"}')),
    "no number": ("no score in the answer 'lovely'", lambda body: says("lovely")),
    "a number out of range": ("no score in the answer '11'", lambda body: says("11")),
    "a picture it refuses": ("400 .*content policy", lambda body: (400, {}, b"content policy")),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_stops_or_is_skipped_and_counted(failure: str) -> None:
    reason, play = FAILURES[failure]
    with serving(play or (lambda body: says("1"))) as server:
        url = server.url if play else DOWN
        with pytest.raises((ValueError, ConnectionError), match=reason):
            create("vlm-judge", url, retries=1).score(grey(0, 1), ["a", "b"])
        reward = create("vlm-judge", url, retries=1, on_failure="skip")
        for count in (2, 4):
            with pytest.warns(
                UserWarning, match=rf"vlm-judge skipped 2 of 2 pictures, {count} so far; last: .*{reason}"
            ):
                scores = reward.score(grey(0, 1), ["a", "b"])
            assert scores.isnan().all()
            assert reward.skipped == count


def test_the_other_pictures_are_scored() -> None:
    with serving(in_turn(says("3"), says("eleven"), says("5"))) as server:
        reward = create("vlm-judge", server.url, on_failure="skip", concurrency=1)
        with pytest.warns(UserWarning, match="skipped 1 of 3"):
            scores = reward.score(grey(0, 1, 2), ["a", "b", "c"])
    assert str(scores.tolist()) == "[3.0, nan, 5.0]"


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_no_picture_would_escape_is_not_skipped(code: int) -> None:
    with serving(lambda body: (code, {}, b"no")) as server, pytest.raises(ValueError, match=f"refuses .*: {code} "):
        create("vlm-judge", server.url, on_failure="skip").score(grey(0), ["a"])


def test_an_endpoint_that_was_given_up_is_asked_once_until_it_answers() -> None:
    busy: Reply = (503, {}, b"")
    replies = [busy, busy, busy, busy, says("1"), busy, says("2")]
    with serving(in_turn(*replies)) as server:
        reward = create("vlm-judge", server.url, retries=2, on_failure="skip")
        asked = []
        for _ in range(4):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                asked.append((*reward.score(grey(0), ["a"]).tolist(), len(server.bodies)))
    assert str(asked) == "[(nan, 3), (nan, 4), (1.0, 5), (2.0, 7)]"


def test_a_run_that_stopped_goes_on_with_more_patience(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name in "abc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"pictures/{name}.png")
    busy: Reply = (503, {}, b"")
    replies = in_turn(says("1"), busy, busy, says("2"), says("eleven"))
    options = ["vlm-judge.backoff=0.01", "vlm-judge.concurrency=1"]
    with serving(replies) as server:
        command = ["pictures", "--prompt", "a", "--reward", "vlm-judge=some-vlm", "-o", "s.jsonl", "--workers", "0"]
        command += ["--batch-size", "1", "--device", "cpu", "--option", f"vlm-judge.url={server.url}"]
        command += [part for option in options for part in ("--option", option)]
        with pytest.raises(SystemExit) as stop:
            main([*command, "--option", "vlm-judge.retries=0"])
        assert stop.value.code == 1
        assert re.search(r"error: --reward vlm-judge: .* failed once, last with 503 ", capsys.readouterr().err)
        with pytest.warns(UserWarning, match="skipped 1 of 1 pictures, 1 so far; last: .*'eleven'"):
            main([*command, "--option", "vlm-judge.retries=1", "--option", "vlm-judge.on_failure=skip"])
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["vlm-judge"] for row in rows] == [1.0, 2.0, None]
    assert rows[2]["error"] == "vlm-judge: nan"


def test_an_answer_that_never_ends_is_given_up() -> None:
    """Every byte comes in time, the whole of them does not."""
    stop = threading.Event()

    class Drip(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            with suppress(OSError):
                while not stop.wait(0.02):
                    self.request.sendall(b" ")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Drip) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(ConnectionError, match="failed 2 times, last with TimeoutError: timed out in the middle"):
            create("vlm-judge", url, timeout=0.3, retries=1).score(grey(0), ["a"])
        stop.set()
        server.shutdown()


@pytest.mark.parametrize("logprob", [math.nan, math.inf, 1e9, 0.5])
def test_what_is_no_probability_is_no_answer(logprob: float) -> None:
    alternatives = [{"token": "Yes", "logprob": logprob}]
    assert judge.VQAScore("some-vlm", "http://localhost").read("Yes", alternatives, "a cat") is None


def test_a_probability_that_was_rounded_up_is_one() -> None:
    alternatives = [{"token": "Yes", "logprob": -0.0}, {"token": " yes", "logprob": -9.0}]
    assert judge.VQAScore("some-vlm", "http://localhost").read("Yes", alternatives, "a cat") == 1.0


@pytest.mark.parametrize(
    ("key", "message"), [("sk-secret\nX-Other: 1", "not a key"), ("sk-secreté", "not a key"), (" \n", "is not set")]
)
def test_a_key_that_is_none_is_refused_unseen(key: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(ValueError, match=f"api_key_env JUDGE_KEY: .*{message}") as caught:
        create("vlm-judge", DOWN, api_key_env="JUDGE_KEY")
    assert "secret" not in str(caught.value)


def test_a_key_may_end_in_a_new_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret\n")
    with serving(lambda body: says("1")) as server:
        create("vlm-judge", server.url, api_key_env="JUDGE_KEY").score(grey(0), ["a"])
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"


@pytest.mark.parametrize("url", ["http://user:sk-secret@localhost", "https://localhost/v1?api_key=sk-secret"])
def test_a_url_with_a_secret_is_refused_unseen(url: str) -> None:
    with pytest.raises(ValueError, match=r"url 'https?://.*\*\*\*.*' holds a secret") as caught:
        create("vlm-judge", url)
    assert "sk-secret" not in str(caught.value)


def test_redirects_are_not_followed() -> None:
    refused = pytest.raises(ValueError, match="refuses the request: 302")
    with serving(lambda body: says("1")) as other:
        elsewhere: Reply = (302, {"Location": other.url}, b"")
        with serving(lambda body: elsewhere) as server, refused:
            create("vlm-judge", server.url).score(grey(0), ["a"])
    assert not other.bodies


def test_the_share_of_the_wanted_text() -> None:
    answers = {
        'a sign that says "Hello World"': ("On top:\nHELLO\nworld!", 1.0),
        'a sign, "abcd"': ("xxabXdxx", 0.75),
        'two signs, "abcd" and “efghij”': ("cd efghij ab", 0.8),
        'an empty sign, "abc"': ("NONE", 0.0),
        'the word "none"': ("none", 1.0),
    }
    with serving(in_turn(*(says(answer) for answer, _ in answers.values()))) as server:
        reward = create("ocr", server.url, concurrency=1)
        scores = reward.score(grey(*[0] * len(answers)), list(answers))
        torch.testing.assert_close(scores, torch.tensor([score for _, score in answers.values()]))
        with pytest.raises(ValueError, match="'a sign' quotes no text"):
            reward.score(grey(0, 0), ['a "b"', "a sign"])
    assert len(server.bodies) == len(answers)


def test_the_distance_is_the_smallest_to_any_part() -> None:
    def plain(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b[1:]) + (a[0] != b[0]), plain(a[1:], b) + 1, plain(a, b[1:]) + 1)

    generator = np.random.default_rng(0)
    for _ in range(20):
        wanted, text = ("".join(generator.choice(list("abc"), size)) for size in generator.integers(1, 5, 2))
        parts = {text[start:end] for start in range(len(text) + 1) for end in range(start, len(text) + 1)}
        assert reading.distance(wanted, text) == min(plain(wanted, part) for part in parts), (wanted, text)


def test_pictures_that_require_a_gradient_are_refused() -> None:
    reward = create("vqascore", "http://localhost:1")
    assert reward.info.differentiable is False
    leaf = grey(0).clone().requires_grad_()
    for images in (leaf, [leaf[0]]):
        with pytest.raises(ValueError, match="'vqascore' is not differentiable"):
            reward.score(images, ["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "url 'localhost:8000'"),
        ({"url": "file:///etc/passwd"}, "url 'file:"),
        ({"template": "How nice is it?"}, "must contain {prompt}"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"timeout": 0}, "timeout 0"),
        ({"retries": -1}, "retries -1"),
        ({"on_failure": "wait"}, "on_failure 'wait': give stop or skip"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create("vlm-judge", **{"url": "http://localhost:1", **options})


def test_a_template_of_ones_own() -> None:
    with serving(lambda body: says("2")) as server:
        create("vlm-judge", server.url, template="{prompt}? 0 to 10.").score(grey(0), ["a cat"])
    assert sent_question(server.bodies[0]) == "a cat? 0 to 10."
