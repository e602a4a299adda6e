"""Prompts that are cut: how many of how many, at what length, and when it is said."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import dmdr_models
import pytest
from dmdr_models import tiny
from dmdr_train.base.errors import UserError
from dmdr_train.data import cut_prompts
from dmdr_train.data.cut_prompts import cuts
from dmdr_train.data.prompt_order import TextPrompts
from dmdr_train.recipe.schema import Model
from dmdr_train.run import runner
from dmdr_train.training.networks import load_family

LONG = "a" * 100
MAX_TOKENS = 20


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd3(tmp_path_factory.mktemp("models") / "sd3")


@pytest.fixture
def family(sd3: Path) -> Any:
    return dmdr_models.load("sd3", sd3, max_tokens=MAX_TOKENS)


@pytest.fixture
def model(sd3: Path) -> Model:
    return Model(family="sd3", path=str(sd3), max_tokens=MAX_TOKENS)


def dataset(*prompts: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": list(prompts)})


def test_how_many_of_how_many(family: Any, model: Model) -> None:
    said = cuts("data.prompts", dataset("a cat", f" {LONG}\n", "b" * 40, LONG), model, family)
    assert said == [
        "warning: data.prompts: 2 of 4 prompts are cut to the 77 tokens of text_encoder and text_encoder_2; "
        "the longest has 102",
        "warning: data.prompts: 3 of 4 prompts are cut to the 20 tokens of text_encoder_3 (model.max_tokens); "
        "the longest has 102",
    ]
    assert cuts("data.prompts", dataset("a cat", ""), model, family) == []


def test_many_prompts_are_sampled(family: Any, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_prompts, "MOST", 4)
    assert cuts("p", ["a", "b", "c", "d", LONG, "e"], model, family) == cuts(
        "p", dataset(*"abcd", LONG, "e"), model, family
    )
    spread = cuts("p", dataset("a", "a", "a", "a", LONG, LONG, LONG, LONG), model, family)
    assert "p: 2 of 4 prompts (sampled evenly from 8) are cut" in spread[0]
    stream = dataset("a", "a", "a", LONG, LONG, LONG).to_iterable_dataset()
    assert "p: 1 of 4 prompts (the first ones of the stream) are cut" in cuts("p", stream, model, family)[0]
    short = dataset("a", LONG).to_iterable_dataset()
    assert "p: 1 of 2 prompts are cut" in cuts("p", short, model, family)[0]


def test_nothing_is_said_of_a_cache(family: Any, model: Model) -> None:
    family.text = lambda prompts: {}
    assert cuts("data.prompts", dataset(LONG), model, family) == []


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    path = tiny.sd3(tmp_path / "sd3")
    shutil.rmtree(path / "tokenizer_2")
    with pytest.raises(ValueError, match=r"^model.path: .* holds no tokenizer_2: download"):
        cuts("data.prompts", dataset(LONG), Model(family="sd3", path=str(path)), dmdr_models.load("sd3", path))


def test_a_length_that_cannot_be_is_the_recipes_own_key(sd3: Path, make_recipe: Any) -> None:
    with pytest.raises(UserError, match=r"^model.max_tokens: max_tokens 513 is not in 1 to 512, .*: give at most 512$"):
        load_family(make_recipe(model__family="sd3", model__path=str(sd3), model__max_tokens=513))


def test_a_run_says_it_of_its_prompts_and_its_samples(
    family: Any, model: Model, make_recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(
        model=model.model_dump(), data={"prompts": "p.txt"}, tracking__samples={"prompts": ["short", "b" * 30]}
    )
    prompts = TextPrompts(dataset("a cat", LONG), 2)
    runner.say_cuts(recipe, SimpleNamespace(family=family, rollouts=SimpleNamespace(prompts=prompts)))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" are ")[0] for line in lines] == [
        "warning: data.prompts: 1 of 2 prompts",
        "warning: data.prompts: 1 of 2 prompts",
        "warning: tracking.samples.prompts: 1 of 2 prompts",
    ]
