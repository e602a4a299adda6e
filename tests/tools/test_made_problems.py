"""The programs that make the built-in problems: they write where the package has its files, and make what it has."""

import json
from pathlib import Path
from typing import Any

import dmdr_train
import make_demo
import pytest
from scene_parts import drawn_pictures
from scene_parts.teachers import sdxl_pipeline

NOT_OF_THE_NETWORK = {
    *("architectures", "dtype", "torch_dtype", "transformers_version"),
    *("_class_name", "_diffusers_version", "_name_or_path"),
}
PROBLEMS = Path(dmdr_train.__file__).parent / "problems"


def test_they_write_into_the_package() -> None:
    assert drawn_pictures.HOME.resolve() == PROBLEMS.resolve() / "scenes"
    assert make_demo.HOME.resolve() == PROBLEMS.resolve() / "shapes"


@pytest.fixture(scope="module")
def made() -> Any:
    return sdxl_pipeline()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2", "scheduler"])
def test_the_shipped_sdxl_has_the_parts_that_the_program_makes(made: Any, part: str) -> None:
    """Of the same shape; the weights come from a long training."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    shipped = json.loads((PROBLEMS / "scenes/teacher_sdxl" / part / name).read_text(encoding="utf-8"))
    config = getattr(made, part).config
    makes = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    makes = json.loads(json.dumps(makes))
    differ = {key for key in shipped if shipped[key] != makes.get(key)}
    assert differ <= NOT_OF_THE_NETWORK


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_the_words_of_the_sdxl_know_the_word_before(made: Any, part: str) -> None:
    clip = getattr(made, part)
    clip.set_attn_implementation("eager")
    ids = made.tokenizer(["a dull red circle above a blue square"], return_tensors="pt").input_ids
    before = clip(ids, output_attentions=True).attentions[0][0].diagonal(-1, dim1=1, dim2=2)
    assert before.min() >= 0.9
