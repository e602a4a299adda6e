"""Prompts that are cut: counted with the tokenizers, as many as the encoders do cut."""

import dmdr_models
import pytest
import torch
from dmdr_models import tiny
from dmdr_models.families.text_encoders import Cut

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sd3 = dmdr_models.load("sd3", tiny.sd3(folder / "sd3"), max_tokens=MAX_TOKENS)
    return {"sd3": sd3, "sdxl": dmdr_models.load("sdxl", tiny.sdxl(folder / "sdxl"))}


def words(tokens: int) -> str:
    """A word of so many tokens of the tiny CLIP, besides start and end."""
    return "a" * tokens


def unread(family, prompt: str, tokens: slice) -> bool:
    """Whether the last character of a prompt has no effect on these states."""
    first, second = family.text([prompt, prompt[:-1] + "b"])["encoder_hidden_states"][:, tokens]
    return torch.equal(first, second)


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_clip_is_cut_where_the_count_says(families, name: str) -> None:
    family = families[name]
    prompts = [words(n) for n in range(73, 79)]
    expected = [unread(family, prompt, slice(0, 77)) for prompt in prompts]
    assert expected == [False, False, False, True, True, True]  # 77 tokens, of which start and end are two
    assert family.text.cut(prompts)[0] == Cut(["text_encoder", "text_encoder_2"], 77, 3, 80)
    assert [bool(family.text.cut([prompt])) and family.text.cut([prompt])[0].length == 77 for prompt in prompts] == (
        expected
    )


def test_t5_is_cut_at_max_tokens(families) -> None:
    family = families["sd3"]
    prompts = [words(n) for n in range(8, 14)]
    cut = [unread(family, prompt, slice(77, None)) for prompt in prompts]
    assert 0 < sum(cut) < len(cut)
    assert [bool(family.text.cut([prompt])) for prompt in prompts] == cut
    (found,) = family.text.cut(prompts)
    assert (found.parts, found.length, found.count) == (["text_encoder_3"], MAX_TOKENS, sum(cut))
    assert found.longest == MAX_TOKENS + sum(cut)


def test_nothing_is_cut(families) -> None:
    assert families["sd3"].text.cut(["a cat", ""]) == []
    assert families["sd3"].text.cut([]) == []
    assert families["sdxl"].text.cut(["a cat " * 10, ""]) == []


def test_counting_reads_no_encoder(tmp_path) -> None:
    family = dmdr_models.load("sd3", tiny.sd3(tmp_path / "sd3"))
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        for weights in (tmp_path / "sd3" / part).glob("*.safetensors"):
            weights.unlink()
    assert family.text.cut([words(200)])[0].count == 1
