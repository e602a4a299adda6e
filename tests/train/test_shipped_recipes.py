"""`dmdr-train recipes`: what it lists, shows and copies."""

from pathlib import Path

import pytest
from dmdr_train.cli import main
from dmdr_train.recipe import shipped
from dmdr_train.recipe.load import BUILT_IN, load_recipe


def test_every_recipe_is_listed_with_what_it_makes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    listed = capsys.readouterr().out
    main(["recipes", "list"])
    assert capsys.readouterr().out == listed
    heads = [line for line in listed.splitlines() if line and not line.startswith(" ")]
    assert heads == sorted(path.stem for path in BUILT_IN.glob("*.yaml"))
    for name in heads:
        text = shipped.source(name)
        assert shipped.about(text).endswith(".")
        assert "Takes" in shipped.notes(text)


def test_the_notes_of_a_recipe() -> None:
    text = "# A small thing, made\n# of two lines.\n#\n# Needs:    one GPU,\n#           and time.\n# Takes:    long.\n"
    text += "\na: 1 # b: c\n"
    assert shipped.about(text) == "A small thing, made of two lines."
    assert shipped.notes(text) == {"Needs": "one GPU, and time.", "Takes": "long."}


def test_a_recipe_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "show", "demo"])
    assert capsys.readouterr().out == (BUILT_IN / "demo.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["demo", "sd3-medium-joint"])
def test_a_copy_has_the_comments_and_means_the_same(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine" / "recipe.yaml"
    main(["recipes", "copy", name, str(file)])
    assert file.read_text(encoding="utf-8").count("#") == shipped.source(name).count("#") > 5
    assert load_recipe(str(file)).model_dump() == load_recipe(name).model_dump()


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    for arguments, line in (
        (["show", "dema"], "error: name: no recipe 'dema'; did you mean demo?\n"),
        (
            ["copy", "demo", str(tmp_path / "there.yaml")],
            f"error: file: {tmp_path}/there.yaml already exists; ",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            main(["recipes", *arguments])
        assert end.value.code == 2
        assert capsys.readouterr().err.startswith(line)
    assert (tmp_path / "there.yaml").read_text() == "mine"
