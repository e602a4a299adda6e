"""Files of held-out prompts, as benchmarks publish them."""

import json
from pathlib import Path

import pytest
from dmdr_train.base.errors import UserError
from dmdr_train.data.prompt_sets import read_prompt_sets

GENEVAL = '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'
COUNTING = GENEVAL.replace("single_object", "counting").replace("a bench", "two benches")
PARTI = "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tbiology-inspired concepts\n"
PARTI += '"G I" in graffiti\tAbstract\tWriting & Symbols\t\na sign "KEEP" here\tAbstract\tBasic\t\n'
DPG = 'item_id,text,proposition_id,tuple\n0,"a cat, big",1,cat\n0,"a cat, big",2,size\n1,a dog,1,dog\n'
COCO = {
    "info": {"year": 2014},
    "images": [{"id": 9}, {"id": 5}],
    "annotations": [
        {"image_id": 9, "id": 1, "caption": "A bicycle. "},
        {"image_id": 9, "id": 2, "caption": "The same bicycle"},
        {"image_id": 5, "id": 3, "caption": "A room"},
    ],
}
STYLES = {"anime": ["a girl"], "photo": ["a street"]}
FILES = {
    "mine.txt": ("a cat\n\n a dog \n", {"mine": ["a cat", "a dog"]}),
    "geneval.jsonl": (
        GENEVAL + COUNTING,
        {"geneval/single_object": ["a photo of a bench"], "geneval/counting": ["a photo of two benches"]},
    ),
    "tags.jsonl": ('{"prompt": "a cat", "tag": "x"}\n', {"tags": ["a cat"]}),
    "PartiPrompts.tsv": (PARTI, {"PartiPrompts": ["bond", '"G I" in graffiti', 'a sign "KEEP" here']}),
    "quoted.tsv": ('Prompt\tNote\n"a ""big""\tcat"\t\n', {"quoted": ['a "big"\tcat']}),
    "dpg_bench.csv": (DPG, {"dpg_bench": ["a cat, big", "a dog"]}),
    "table.csv": ("id,Caption\n3,\"a cat, and a dog\"\n", {"table": ["a cat, and a dog"]}),
    "anime.json": (json.dumps(["a girl", " ", "a boat "]), {"anime": ["a girl", "a boat"]}),
    "hpd.json": (json.dumps(STYLES), {"hpd/anime": ["a girl"], "hpd/photo": ["a street"]}),
    "test.json": (json.dumps([{"prompt": "a cat", "image_path": ["1.jpg"]}]), {"test": ["a cat"]}),
    "captions_val2014.json": (json.dumps(COCO), {"captions_val2014": ["A bicycle.", "A room"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_as_they_are_published(tmp_path: Path, name: str) -> None:
    content, expected = FILES[name]
    (tmp_path / name).write_text(content)
    assert read_prompt_sets([str(tmp_path / name)]) == expected


def test_a_folder_has_a_prompt_in_each_file(tmp_path: Path) -> None:
    folder = tmp_path / "dpg"
    folder.mkdir()
    for name, text in {"2.txt": "a dog\nin a hat\n", "10.txt": "\ufeffa cat\n", "notes.md": "no prompt"}.items():
        (folder / name).write_text(text)
    assert read_prompt_sets([str(folder)]) == {"dpg": ["a cat", "a dog in a hat"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "geneval.jsonl",
            GENEVAL + GENEVAL.replace("single_object", " "),
            "geneval.jsonl has 2 prompts and 1 tags; give both in every row",
        ),
        ("a.yaml", "a cat", "a.yaml has no known suffix; give a folder, or a file in .txt, .jsonl"),
        ("a.json", "{", "a.json is not JSON"),
        ("a.json", "[" * 100_000, "a.json is not JSON: its brackets"),
        ("a.json", "3", "a.json is no list; give a list of texts or of objects, or lists by style"),
        ("a.json", '["a", {"text": 3}]', "entry 2 of .*a.json has no text in prompt, caption or text"),
        ("a.json", '["\\ud800"]', "entry 1 of .*a.json cannot be UTF-8"),
        ("a.json", '{"photo": []}', "a.json holds no prompt in a/photo; put some there"),
        ("a.json", "[]", "a.json holds no prompt in a; put some there"),
        ("a.txt", "\n", "a.txt holds no prompt; put some there"),
        ("a.csv", "one,two\na,b\n", "a.csv has no column prompt, caption or text, only one, two; rename one"),
    ],
)
def test_other_files_are_refused_in_a_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"^tracking.evaluation.prompt_files.0: .*{message}"):
        read_prompt_sets([str(tmp_path / name)])


def test_two_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "a.json").write_text('["a dog"]')
    with pytest.raises(UserError, match=r"prompt_files.1: .*a.json is the second set with the name a; rename"):
        read_prompt_sets([str(tmp_path / "a.txt"), str(tmp_path / "a.json")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \.txt file; give a folder with a prompt in each"):
        read_prompt_sets([str(tmp_path / "empty")])
