"""How scores are read from what a model says, over HTTP or in this process."""

import re
import unicodedata

_NUMBER = r"(?<![\w.])-?\d+(?:\.\d+)?"


def rating(answer: str, lowest: float, highest: float) -> float | None:
    """The only number in an answer, without an "out of 10" behind it; None for other answers and other ranges."""
    numbers = re.findall(_NUMBER, re.sub(rf"\s*(?:/|out of)\s*{highest:g}\b", "", answer))
    return _within(numbers[0], lowest, highest) if len(numbers) == 1 else None


def rating_after(mark: str, answer: str, lowest: float, highest: float) -> float | None:
    """The number behind the last `mark` in an answer; None if there is none, or it is out of range."""
    numbers = re.findall(rf"{re.escape(mark)}[\s*]*({_NUMBER})", answer)
    return _within(numbers[-1], lowest, highest) if numbers else None


def word(token: str) -> str:
    """A token's letters in lower case: "Yes" of " Yes,"."""
    return re.sub(r"\W", "", token).lower()


def quoted(prompt: str) -> list[str]:
    """The parts of a prompt in double quotes, as `letters`. Raises ValueError if there is none."""
    found = [part for each in re.findall(r'["“”]([^"“”]+)["“”]', prompt) if (part := letters(each))]
    if not found:
        raise ValueError(f"prompt {prompt!r} quotes no text: put what the picture should say in double quotes")
    return found


def letters(text: str) -> str:
    """A text without white space, in lower case and the most common form of each letter."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def share_read(prompt: str, transcript: str) -> float:
    """1 − Σ d(wanted, transcript) / Σ len(wanted), in [0, 1].

    The sums run over the quoted parts of the prompt; d is the smallest edit distance to any part of the transcript, so
    further text does not lower the score. Case and white space are ignored. Source: the reward of Flow-GRPO,
    arXiv 2505.05470, which compares with the whole transcript.
    """
    wanted, read = quoted(prompt), letters(transcript)
    return 1 - sum(distance(part, read) for part in wanted) / sum(map(len, wanted))


def _within(number: str, lowest: float, highest: float) -> float | None:
    return value if lowest <= (value := float(number)) <= highest else None


def distance(wanted: str, text: str) -> int:
    """The smallest edit distance between `wanted` and any part of `text`."""
    above = [0] * (len(text) + 1)  # a part may start anywhere
    for row, letter in enumerate(wanted, start=1):
        line = [row]
        for column, other in enumerate(text):
            line.append(min(above[column] + (letter != other), above[column + 1] + 1, line[column] + 1))
        above = line
    return min(above)
