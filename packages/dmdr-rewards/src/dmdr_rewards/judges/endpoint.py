"""Questions about a picture to an endpoint with OpenAI's chat completions API, with retries."""

import base64
import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from email.message import Message
from typing import Any, NamedTuple

from PIL import Image

from dmdr_rewards.base.errors import UnansweredError
from dmdr_rewards.base.secrets import redacted, secret_in

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_LONGEST_WAIT = 60.0
_LONGEST_ANSWER = 1 << 22  # bytes; a judge's answer has a few thousand
_FOR_ALL = (301, 302, 303, 307, 308, 401, 403, 404, 405)  # refusals that apply to every picture


class Answer(NamedTuple):
    """An answer.

    text      the answer's text
    logprobs  the alternatives of its first token, dicts of token and logprob; empty if the endpoint gives none
    """

    text: str
    logprobs: list[dict[str, Any]]


class Endpoint:
    """The model `model` at `url`. The key is read from the environment, sent only to `url`, and never shown.

    timeout  seconds from the start of a request to the last byte of its answer

    Raises ValueError for a url that is not http(s) or holds a secret, an environment variable that is unset or does not
    hold a key, and numbers out of range.
    """

    def __init__(
        self, url: str, model: str, api_key_env: str | None, timeout: float, retries: int, backoff: float
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url {redacted(url)!r}: give the endpoint's, such as http://localhost:8000/v1")
        if secret_in(url) is not None:
            raise ValueError(
                f"url {redacted(url)!r} holds a secret: leave it out, and name its variable in api_key_env"
            )
        if "?" in url or "#" in url:
            raise ValueError("url has a query, which may hold a secret; give the part before it, as in http://host/v1")
        if api_key_env is not None and not _VARIABLE.fullmatch(api_key_env):
            raise ValueError(
                "api_key_env is not the name of a variable, such as JUDGE_KEY; give the name, never the key"
            )
        if timeout <= 0 or retries < 0 or backoff < 0:
            raise ValueError(f"timeout {timeout} must be above 0; retries {retries} and backoff {backoff}, 0 or more")
        key = None if api_key_env is None else os.environ.get(api_key_env, "").strip()
        if key == "":
            raise ValueError(f"api_key_env {api_key_env}: that environment variable is not set")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ValueError(f"api_key_env {api_key_env}: its value is not a key, it holds more than visible ASCII")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model = model
        self._key = key
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._given_up = False

    def ask(self, picture: Image.Image, question: str, request: dict[str, Any]) -> Answer:
        """Send a picture and a question, and return the answer.

        request  further fields of the body, such as max_tokens

        The request is repeated after 408, 429, 5xx, a time-out, a broken connection, and an answer that does not follow
        the API. The wait before it is the endpoint's Retry-After, otherwise it doubles each time. After all retries of
        a request have failed, further requests are sent only once each until one is answered.

        Raises UnansweredError if the endpoint refuses this request, ValueError if it would refuse any request, and
        ConnectionError if all retries have failed.
        """
        content = [{"type": "image_url", "image_url": {"url": _data_url(picture)}}, {"type": "text", "text": question}]
        message = {"role": "user", "content": content}
        body = json.dumps({"model": self.model, "messages": [message], "temperature": 0, **request}).encode()
        attempts = 1 if self._given_up else self._retries + 1
        for attempt in range(attempts):
            wait = self._backoff * 2**attempt
            try:
                answer = self._send(body)
            except urllib.error.HTTPError as error:
                reason = self._reason(error)
                if error.code not in (408, 429) and error.code < 500:
                    kind = ValueError if error.code in _FOR_ALL else UnansweredError
                    raise kind(f"{self.url} refuses the request: {reason}") from None
                wait = _asked_for(error.headers, wait)
            except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
                reason = f"{type(error).__name__}: {error}"
            except (AttributeError, KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
                reason = f"not an answer of chat completions, {type(error).__name__}: {error}"
            else:
                self._given_up = False
                return answer
            if attempt < attempts - 1:
                time.sleep(min(wait, _LONGEST_WAIT))
        self._given_up = True
        times = f"{attempts} times" if attempts > 1 else "once"
        raise ConnectionError(f"{self.url} failed {times}, last with {reason}: is it up, is url= right?")

    def _send(self, body: bytes) -> Answer:
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        request = urllib.request.Request(self.url, body, headers)
        deadline = time.monotonic() + self._timeout
        with self._opener.open(request, timeout=self._timeout) as response:
            choice = json.loads(_read(response, deadline))["choices"][0]
        tokens = (choice.get("logprobs") or {}).get("content") or [{}]
        alternatives = [{"token": str(each["token"]), "logprob": float(each["logprob"])}
                        for each in tokens[0].get("top_logprobs") or []]  # fmt: skip
        return Answer(self._without_key(str(choice["message"]["content"] or "")), alternatives)

    def _reason(self, error: urllib.error.HTTPError) -> str:
        with error:
            text = error.read(2000).decode(errors="replace")
        return self._without_key(f"{error.code} {error.reason}, {text[:300]}")

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send the key to another address."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """Read the whole answer until the deadline. A socket's own time-out would start again with every byte."""
    parts, length = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        length += len(part)
        if time.monotonic() > deadline:
            raise TimeoutError("timed out in the middle of an answer")
        if length > _LONGEST_ANSWER:
            raise ValueError(f"it is longer than {_LONGEST_ANSWER} bytes")
    return b"".join(parts)


def _asked_for(headers: Message, otherwise: float) -> float:
    try:
        return max(float(headers.get("Retry-After", "")), 0.0)
    except ValueError:
        return otherwise


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
