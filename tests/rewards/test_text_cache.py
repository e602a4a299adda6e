import torch
from dmdr_rewards.prompts.text_cache import TextCache
from torch import Tensor


def cache(capacity: int = 3) -> tuple[TextCache, list[list[str]]]:
    asked: list[list[str]] = []

    def encode(prompts: list[str]) -> Tensor:
        asked.append(prompts)
        return torch.tensor([[float(len(prompt)), 1.0] for prompt in prompts])

    return TextCache(encode, capacity), asked


def test_order_and_repetition_are_kept() -> None:
    texts, asked = cache()
    assert texts(["aa", "b", "aa", "ccc"])[:, 0].tolist() == [2, 1, 2, 3]
    assert asked == [["aa", "b", "ccc"]]


def test_only_new_prompts_are_encoded() -> None:
    texts, asked = cache()
    texts(["a", "bb"])
    assert texts(["bb", "ccc", "a"])[:, 0].tolist() == [2, 3, 1]
    assert asked == [["a", "bb"], ["ccc"]]


def test_the_least_recently_used_is_forgotten() -> None:
    texts, asked = cache(capacity=2)
    texts(["a"])
    texts(["bb"])
    texts(["a"])
    texts(["ccc"])
    assert len(texts) == 2
    texts(["a"])
    texts(["bb"])
    assert asked == [["a"], ["bb"], ["ccc"], ["bb"]]


def test_one_that_remembers_nothing_encodes_every_batch_whole() -> None:
    texts, asked = cache()
    texts(["a"])
    texts.resize(0)
    assert len(texts) == 0
    texts(["a", "bb"])
    texts(["bb", "a", "bb"])
    assert asked == [["a"], ["a", "bb"], ["bb", "a"]]


def test_a_batch_larger_than_the_cache_is_answered() -> None:
    texts, _ = cache(capacity=1)
    assert texts(["a", "bb", "ccc"])[:, 0].tolist() == [1, 2, 3]
    assert len(texts) == 1


def test_what_inference_mode_left_can_be_trained_on() -> None:
    texts, _ = cache()
    with torch.inference_mode():
        texts(["a"])
    pixels = torch.ones(2, requires_grad=True)
    (texts(["a"])[0] * pixels).sum().backward()
    assert pixels.grad is not None
