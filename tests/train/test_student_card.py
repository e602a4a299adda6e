"""What an exported student says about how to draw from it."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from dmdr_train.recipe.schema import Recipe
from dmdr_train.reporting.model_card import quantised_base, sampling_settings, usage


class Told:
    """Students that say what they were asked."""

    sampling = {"size": 64}  # noqa: RUF012

    def __init__(self, keeps_lora: bool) -> None:
        self.keeps_lora = keeps_lora

    def usage(self, *asked: Any) -> Any:
        return asked


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [("cpu", "fp32", "float32"), ("cpu", "bf16", "bfloat16"), ("cuda", "fp16", "float16"), ("auto", "fp32", "float32")],
)
@pytest.mark.parametrize("keeps_lora", [True, False])
@pytest.mark.parametrize("lora", [{"rank": 2, "alpha": 2}, None])
def test_a_student_is_drawn_where_and_as_it_was_trained(
    make_recipe: Callable[..., Recipe], device: str, precision: str, dtype: str, keeps_lora: bool, lora: Any
) -> None:
    settings = make_recipe(run__device=device, optim__precision=precision, model__generator_lora=lora)
    family: Any = SimpleNamespace(students=Told(keeps_lora))
    folder, sampling, is_lora, where, what = usage(settings, family, Path("student"))  # type: ignore[misc]
    assert (folder, where, what) == (Path("student"), "cpu" if device == "auto" else device, dtype)
    assert is_lora is (keeps_lora and lora is not None)
    assert sampling == sampling_settings(settings, family)
    assert (sampling["size"], sampling["family"]) == (64, "sit")


def test_a_student_says_what_its_weights_were_trained_on(make_recipe: Callable[..., Recipe]) -> None:
    lora = {"rank": 2, "alpha": 2}
    assert quantised_base(make_recipe(model__generator_lora=lora)) == ""
    said = quantised_base(make_recipe(model__generator_lora=lora, memory__quantize="int8"))
    assert said == (
        " It was trained on a frozen network whose linear layers were quantised (int8), and is for the weights before "
        "quantisation."
    )
