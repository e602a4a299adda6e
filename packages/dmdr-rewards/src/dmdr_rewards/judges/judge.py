"""Rewards that ask a vision-language model, here at any endpoint with OpenAI's chat completions API.

    reward = dmdr_rewards.create("vqascore", checkpoint="qwen2.5-vl-7b", url="http://localhost:8000/v1")

`checkpoint` is the model's name at the endpoint. Pictures are sent as PNG inside the JSON, several requests at a time;
scores are in the order of the pictures. There is no gradient: pictures that require one are refused.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from dmdr_rewards.base.errors import UnansweredError
from dmdr_rewards.interface.info import BUILT_IN, RewardInfo
from dmdr_rewards.judges.endpoint import Answer, Endpoint
from dmdr_rewards.judges.reading import quoted, rating, share_read, word
from dmdr_rewards.pictures.images import Images, as_pictures
from dmdr_rewards.prompts.texts import as_texts

_ROUNDING = 1e-3  # some endpoints print log-probabilities with few digits


class Asked(Protocol):
    """A vision-language model: an `Endpoint`, or one in this process."""

    def ask(self, picture: Image.Image, question: str, request: dict[str, Any]) -> Answer:
        """The answer to a question about a picture. Raises UnansweredError or ConnectionError if there is none."""
        ...


class Judge(ABC):
    """Ask one question per picture and read one number from the answer. Subclasses define `template` and `read`.

    model        the model that is asked
    template     the question; {prompt} is replaced by the prompt
    concurrency  number of requests at the same time
    fallback     score of a picture whose answer cannot be read; if None, such an answer is a failure
    on_failure   "stop": a picture without a score is an error; "skip": its score is NaN, with a warning. A refusal that
                 applies to every picture (401, 403, 404) is always an error
    device       device of the scores

    `skipped` counts the pictures without a score.

    Raises ValueError for invalid options.
    """

    info: ClassVar[RewardInfo]
    template: str
    request: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        model: Asked,
        template: str | None,
        concurrency: int,
        fallback: float | None,
        on_failure: Literal["stop", "skip"],
        device: str | torch.device,
    ) -> None:
        if template is not None and "{prompt}" in self.template and "{prompt}" not in template:
            raise ValueError(f"template {template!r} must contain {{prompt}}")
        if concurrency < 1:
            raise ValueError(f"concurrency {concurrency}: give at least 1")
        if on_failure not in ("stop", "skip"):
            raise ValueError(f"on_failure {on_failure!r}: give stop or skip")
        self.template = template or self.template
        self._model = model
        self._concurrency = concurrency
        self._fallback = fallback
        self._skips = on_failure == "skip"
        self._device = torch.device(device)
        self.skipped = 0

    def question(self, prompt: str) -> str:
        """The question for a prompt."""
        return self.template.replace("{prompt}", prompt)

    @abstractmethod
    def read(self, answer: str, logprobs: list[dict[str, Any]], prompt: str) -> float | None:
        """The score in an answer, or None. logprobs: the alternatives of the first token, may be empty."""

    def score(self, images: Images, prompts: Tensor | Sequence[Any]) -> Tensor:
        """Score B pictures under B texts -> float32 Tensor[B], without gradient; NaN for a skipped picture.

        Raises ValueError for pictures or prompts that cannot be scored, pictures that require a gradient, a request
        that the endpoint refuses, and an answer that cannot be read; and ConnectionError for an endpoint that does not
        answer after all retries. With `on_failure="skip"`, the last three skip the picture instead.
        """
        pictures = without_gradient(images, self.info.name)
        texts = as_texts(prompts, len(pictures))
        questions = [self.question(text) for text in texts]
        with ThreadPoolExecutor(self._concurrency) as pool:  # an exception drops the requests that still wait
            scores = list(pool.map(self._score_or_reason, pictures, questions, texts))
        reasons = [score for score in scores if isinstance(score, str)]
        if reasons:
            self.skipped += len(reasons)
            counted = f"{len(reasons)} of {len(scores)} pictures, {self.skipped} so far"
            warnings.warn(f"{self.info.name} skipped {counted}; last: {reasons[-1]}", stacklevel=2)
        values = [math.nan if isinstance(score, str) else score for score in scores]
        return torch.tensor(values, dtype=torch.float32, device=self._device)

    def _score_or_reason(self, picture: Image.Image, question: str, prompt: str) -> float | str:
        try:
            return self._score(picture, question, prompt)
        except (ConnectionError, UnansweredError) as error:
            if not self._skips:
                raise
            return str(error)

    def _score(self, picture: Image.Image, question: str, prompt: str) -> float:
        answer, logprobs = self._model.ask(picture, question, self.request)
        score = self.read(answer, logprobs, prompt)
        score = self._fallback if score is None else score
        if score is None:
            raise UnansweredError(
                f"{self.info.name}: no score in the answer {answer[:200]!r} under the prompt {prompt!r}: change the "
                "template or the model, or give such pictures the score fallback="
            )
        return score


class EndpointJudge(Judge):
    """A judge that asks a model over HTTP. The options are those of `Judge`, and

    checkpoint   the model's name at the endpoint
    url          address of the API, such as http://localhost:8000/v1
    api_key_env  name of the environment variable that holds the API key; no key is sent if None
    timeout      seconds from the start of a request to the last byte of its answer
    retries      how often a request is repeated after 408, 429, 5xx, a time-out, a broken connection or a malformed
                 answer
    backoff      seconds before the first retry; each further wait is twice as long
    dtype        ignored: the endpoint chooses its own precision
    """

    def __init__(
        self,
        checkpoint: str,
        url: str,
        template: str | None = None,
        api_key_env: str | None = None,
        timeout: float = 60.0,
        retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 8,
        fallback: float | None = None,
        on_failure: Literal["stop", "skip"] = "stop",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        endpoint = Endpoint(url, str(checkpoint), api_key_env, timeout, retries, backoff)
        super().__init__(endpoint, template, concurrency, fallback, on_failure, device)


class VQAScore(EndpointJudge):
    """The probability that the model answers "Yes" when asked whether the picture shows the prompt, in [0, 1].

    It is the sum over all spellings of "yes" among the likeliest alternatives of the first token. A sum above 1 counts
    as no answer. If the endpoint gives no log-probabilities, the score is 1 for yes and 0 for no, with a warning.
    Source: "Evaluating Text-to-Visual Generation with Image-to-Text Generation", arXiv 2404.01291.
    """

    template = 'Does this figure show "{prompt}"? Please answer yes or no.'
    request: ClassVar[dict[str, Any]] = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
    info = BUILT_IN["vqascore"]

    def read(self, answer: str, logprobs: list[dict[str, Any]], prompt: str) -> float | None:
        if logprobs:
            share = sum(math.exp(min(each["logprob"], 1.0)) for each in logprobs if word(each["token"]) == "yes")
            return min(share, 1.0) if share <= 1 + _ROUNDING else None
        warnings.warn("the endpoint gives no logprobs: vqascore is 1 for yes and 0 for no", stacklevel=2)
        return {"yes": 1.0, "no": 0.0}.get(word(answer.split()[0]) if answer.split() else "")


class Rating(EndpointJudge):
    """The number from 0 to 10 in the model's answer."""

    template = (
        "How well does this picture show what was asked for, and how good does it look? Asked for: {prompt}\n"
        "Answer with one number from 0 (nothing is right) to 10 (perfect), and nothing else."
    )
    request: ClassVar[dict[str, Any]] = {"max_tokens": 16}
    info = BUILT_IN["vlm-judge"]

    def read(self, answer: str, logprobs: list[dict[str, Any]], prompt: str) -> float | None:
        return rating(answer, *self.info.range)


class OCR(EndpointJudge):
    """The share of the prompt's quoted text that the model reads in the picture (`reading.share_read`)."""

    template = "Transcribe all text in this picture, as it is written. Answer with the text alone; if none, with NONE."
    request: ClassVar[dict[str, Any]] = {"max_tokens": 512}
    info = BUILT_IN["ocr"]

    def question(self, prompt: str) -> str:
        """The question. Raises ValueError for a prompt without text in double quotes."""
        quoted(prompt)
        return super().question(prompt)

    def read(self, answer: str, logprobs: list[dict[str, Any]], prompt: str) -> float | None:
        return share_read(prompt, "" if answer.strip().strip(".") == "NONE" else answer)


def without_gradient(images: Images, name: str) -> list[Image.Image]:
    """Pictures for a reward without a gradient, called `name` -> PIL pictures of 8 bits.

    Raises ValueError for pictures that cannot be scored, and for pictures that require a gradient.
    """
    each = [images] if isinstance(images, Tensor) else images
    if any(isinstance(picture, Tensor) and picture.requires_grad for picture in each):
        raise ValueError(
            f"reward {name!r} is not differentiable, and these pictures require a gradient: give pictures.detach() "
            "where no gradient is needed (GRPO, evaluation)"
        )
    return [_as_pil(picture) for picture in as_pictures(images)]


def _as_pil(picture: "Image.Image | Tensor") -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
