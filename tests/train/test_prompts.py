"""Prompts: every kind of file, an order that follows from seed and step alone, and what is said to a wrong file."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from dmdr_train.base.errors import UserError
from dmdr_train.base.random_draws import Draws
from dmdr_train.data.prompt_files import check_prompts, evaluation_prompts, open_prompts
from dmdr_train.data.prompt_order import StreamedPrompts, TextPrompts, permutation, text_prompts
from dmdr_train.recipe.schema import Data

TEXTS = [f"{count} grey {animal}, “quoted”" for count in range(1, 6) for animal in ("cats", "ants")]  # ten
BATCH = 4


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the user's own cache of datasets alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def write_text(folder: Path) -> str:
    (folder / "p.txt").write_bytes(("\ufeff" + "\r\n\n".join(TEXTS[:5]) + "\n  \n\t" + "\n".join(TEXTS[5:])).encode())
    return "p.txt"


def write_jsonl(folder: Path) -> str:
    rows = [{"id": i, "prompt": text} for i, text in enumerate([*TEXTS, " ", None])]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "p.jsonl"


def write_csv(folder: Path) -> str:
    datasets.Dataset.from_dict({"id": range(10), "prompt": TEXTS}).to_csv(folder / "p.csv", index=False)
    return "p.csv"


def write_parquet(folder: Path) -> str:
    datasets.Dataset.from_dict({"id": range(10), "prompt": TEXTS}).to_parquet(folder / "p.parquet")
    return "p.parquet"


def write_saved(folder: Path) -> str:
    datasets.Dataset.from_dict({"prompt": TEXTS, "id": range(10)}).save_to_disk(folder / "saved")
    return "saved"


def write_saved_splits(folder: Path) -> str:
    splits = {"train": datasets.Dataset.from_dict({"prompt": TEXTS}), "rest": datasets.Dataset.from_dict({"a": [1]})}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    return "splits"


def write_folder(folder: Path) -> str:
    (folder / "shards").mkdir()
    for i in range(2):
        part = datasets.Dataset.from_dict({"caption": TEXTS[5 * i : 5 * i + 5]})
        part.to_parquet(folder / f"shards/train-{i:05d}-of-00002.parquet")
    return "shards"


KINDS = (write_text, write_jsonl, write_csv, write_parquet, write_saved, write_saved_splits, write_folder)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def whole() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": TEXTS})


def walk(prompts: Any, updates: range, name: str = "generator", world: int = 1, micro: int = 1, seed: int = 7) -> list:
    """What all processes draw together, update by update, each process with prompts of its own making."""
    size = BATCH // world // micro
    processes = [prompts() for _ in range(world)]
    return [
        text
        for number in updates
        for rank in range(world)
        for first in range(rank * size * micro, (rank + 1) * size * micro, size)
        for text in processes[rank].draw(Draws(seed, (name, number), range(first, first + size)))
    ]


# -- where they come from


@pytest.mark.parametrize("write", KINDS)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_holds_the_same_prompts(write: Callable[..., str], streaming: bool, in_folder: Path) -> None:
    data = Data(prompts=write(in_folder), streaming=streaming)
    check_prompts(data)
    texts = open_prompts(data)
    assert [row["prompt"].strip() for row in texts] == TEXTS
    assert set(next(iter(texts))) == {"prompt"}
    assert isinstance(texts, datasets.IterableDataset) == streaming
    assert isinstance(text_prompts(data, BATCH), StreamedPrompts if streaming else TextPrompts)


def test_nothing_is_written_beside_the_prompts(in_folder: Path) -> None:
    folder = in_folder / write_saved(in_folder)
    before = sorted(folder.iterdir())
    open_prompts(Data(prompts=str(folder)))
    assert sorted(folder.iterdir()) == before


def test_the_column_is_chosen(in_folder: Path) -> None:
    datasets.Dataset.from_dict({"n": [1], "text": ["t"], "caption": ["c"]}).to_parquet("usual.parquet")
    assert open_prompts(Data(prompts="usual.parquet"))["prompt"][0] == "c"
    assert open_prompts(Data(prompts="usual.parquet", column="text"))["prompt"][0] == "t"
    datasets.Dataset.from_dict({"n": [1], "words": ["w"]}).to_parquet("only.parquet")
    check_prompts(Data(prompts="only.parquet"))
    assert open_prompts(Data(prompts="only.parquet"))["prompt"][0] == "w"


def test_words_that_pandas_takes_for_nothing_are_prompts(in_folder: Path) -> None:
    Path("p.csv").write_text("prompt\nnull\nNA\nnone\n")
    assert list(open_prompts(Data(prompts="p.csv"))["prompt"]) == ["null", "NA", "none"]


# -- their order


def test_each_prompt_once_in_an_epoch(whole: datasets.Dataset) -> None:
    drawn = walk(lambda: TextPrompts(whole, BATCH), range(10))  # four epochs of ten
    epochs = [drawn[10 * e : 10 * e + 10] for e in range(4)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert TEXTS not in epochs


def test_the_order_is_the_one_in_the_docstring(whole: datasets.Dataset) -> None:
    place = 6 * BATCH + 3
    expected = TEXTS[permutation(7, "generator", place // 10, 10)[place % 10]]
    assert TextPrompts(whole, BATCH).draw(Draws(7, ("generator", 6), [3])) == [expected]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("world", "micro"), [(2, 1), (1, 4), (2, 2)])
def test_the_split_of_a_batch_does_not_matter(whole: datasets.Dataset, world: int, micro: int, streamed: bool) -> None:
    def make() -> Any:
        return StreamedPrompts(whole.to_iterable_dataset(), BATCH, buffer=3) if streamed else TextPrompts(whole, BATCH)

    assert walk(make, range(7), world=world, micro=micro) == walk(make, range(7))


@pytest.mark.parametrize("streamed", [False, True])
def test_seed_and_update_have_orders_of_their_own(whole: datasets.Dataset, streamed: bool) -> None:
    def make() -> Any:
        return StreamedPrompts(whole.to_iterable_dataset(), BATCH, buffer=5) if streamed else TextPrompts(whole, BATCH)

    orders = [walk(make, range(5)), walk(make, range(5), name="fake_score"), walk(make, range(5), seed=8)]
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("streamed", [False, True])
def test_a_resumed_run_goes_on_exactly(whole: datasets.Dataset, streamed: bool) -> None:
    """A new process that begins at a later step, whatever the other update has drawn, and one that goes back."""

    def make() -> Any:
        parts = whole.to_iterable_dataset(num_shards=3)
        return StreamedPrompts(parts, BATCH, buffer=4) if streamed else TextPrompts(whole, BATCH)

    through = walk(make, range(12))
    assert walk(make, range(5, 12)) == through[5 * BATCH :]
    prompts = make()
    prompts.draw(Draws(7, ("fake_score", 40), range(BATCH)))
    assert walk(lambda: prompts, range(12)) == through
    assert walk(lambda: prompts, range(3, 12)) == through[3 * BATCH :]


def test_a_stream_gives_each_prompt_once_in_an_epoch(whole: datasets.Dataset) -> None:
    drawn = walk(lambda: StreamedPrompts(whole.to_iterable_dataset(), BATCH, buffer=4), range(10))
    epochs = [drawn[10 * e : 10 * e + 10] for e in range(4)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_larger_than_the_file(in_folder: Path) -> None:
    Path("p.txt").write_text("a\n b \nc")
    drawn = text_prompts(Data(prompts="p.txt"), 9).draw(Draws(1, ("generator", 0), range(9)))
    assert Counter(drawn) == {"a": 3, "b": 3, "c": 3}


def test_global_randomness_is_left_alone(whole: datasets.Dataset) -> None:
    before = torch.get_rng_state()
    permutation.cache_clear()
    TextPrompts(whole, BATCH).draw(Draws(3, ("generator", 1), range(4)))
    StreamedPrompts(whole.to_iterable_dataset(), BATCH).draw(Draws(3, ("generator", 1), range(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_order_is_pinned() -> None:
    """Runs can be repeated with later versions: a change of these numbers is a change of every run."""
    assert permutation(30, "generator", 0, 8).tolist() == [2, 6, 5, 7, 4, 3, 0, 1]


# -- what is wrong with a file: seen at once, without a large import


@pytest.mark.parametrize(
    ("name", "content", "more", "said"),
    [
        ("p.txt", b"", {}, "data.prompts: p.txt holds no prompt; put some there"),
        ("p.txt", b" \n\t\r\n\n", {}, "data.prompts: p.txt holds no prompt"),
        ("p.txt", b"\xef\xbb\xbf", {}, "data.prompts: p.txt holds no prompt"),
        (
            "p.txt",
            b"fine\ncaf\xe9\n",
            {},
            "data.prompts: line 2 of p.txt is not UTF-8 (invalid continuation byte); save it as UTF-8",
        ),
        ("p.txt", "a cat".encode("utf-16"), {}, "data.prompts: p.txt is UTF-16 or UTF-32; save it as UTF-8"),
        ("p.txt", b"fine", {"column": "prompt"}, "data.column: 'prompt' of p.txt is not there; valid are text"),
        ("p.doc", b"fine", {}, "data.prompts: p.doc has no known suffix; give a file in .txt, .jsonl, .csv"),
        ("p.jsonl", b"\n", {}, "data.prompts: p.jsonl holds no prompt"),
        ("p.jsonl", b"a cat", {}, "data.prompts: line 1 of p.jsonl is not JSON (Expecting value); give"),
        ("p.jsonl", b'["a cat"]', {}, 'data.prompts: line 1 of p.jsonl is no object; give lines such as {"prompt"'),
        ("p.jsonl", b'{"n": 1}', {}, "data.prompts: p.jsonl has no text, only n; give a column of texts"),
        ("p.jsonl", b'{"a": "x", "b": "y"}', {}, "data.column: is null and p.jsonl has texts in a, b; name one"),
        (
            "p.jsonl",
            b'{"captoin": "x"}',
            {"column": "caption"},
            "data.column: 'caption' of p.jsonl is not there; did y",
        ),
        ("p.jsonl", b'{"n": 1, "t": "x"}', {"column": "n"}, "data.column: 'n' of p.jsonl holds no text; valid are t"),
        ("p.csv", b"prompt\n", {}, "data.prompts: p.csv holds no prompt"),
        ("p.csv", b"id,prompt\n1,a\n", {"column": "promt"}, "'promt' of p.csv is not there; did you mean prompt?"),
        ("p.parquet", b"PAR1 not really", {}, "data.prompts: "),
    ],
)
def test_a_wrong_file(in_folder: Path, name: str, content: bytes, more: dict[str, str], said: str) -> None:
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        check_prompts(Data(prompts=name, **more))
    assert str(caught.value).startswith(said) or said in str(caught.value)


def test_a_wrong_table(in_folder: Path) -> None:
    datasets.Dataset.from_dict({"n": [1]}).to_parquet("numbers.parquet")
    with pytest.raises(UserError, match="has no text, only n"):
        check_prompts(Data(prompts="numbers.parquet"))
    datasets.Dataset.from_dict({"prompt": ["x"]}).select([]).to_parquet("empty.parquet")
    with pytest.raises(UserError, match="holds no prompt"):
        check_prompts(Data(prompts="empty.parquet"))


@pytest.mark.parametrize("name", ["gone.txt", "far/gone.jsonl", "/gone/x", "./gone/x", "a/b/c", "gone", "~/x"])
def test_no_such_file(in_folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"data.prompts: no file or folder .*give one that exists, or a hub name"):
        check_prompts(Data(prompts=name))


def test_a_folder_without_files(in_folder: Path) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=r"data.prompts: folder empty is empty"):
        check_prompts(Data(prompts="empty"))


def test_a_hub_name_passes(in_folder: Path) -> None:
    check_prompts(Data(prompts="owner/prompts-2.0"))
    check_prompts(Data())


def test_the_check_imports_nothing_large(in_folder: Path) -> None:
    program = (
        "import sys; from dmdr_train.data.prompt_files import check_prompts\n"
        "from dmdr_train.recipe.schema import Data\n"
        f"for name in {[write(in_folder) for write in KINDS]}: check_prompts(Data(prompts=name))\n"
        "print(*{'torch', 'datasets', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# -- what shows only when it is opened


@pytest.mark.parametrize("streaming", [False, True])
def test_no_such_split(in_folder: Path, streaming: bool) -> None:
    with pytest.raises(UserError, match=r"data.split: splits has no split 'tarin'; valid are train, rest"):
        open_prompts(Data(prompts=write_saved_splits(in_folder), split="tarin", streaming=streaming))
    with pytest.raises(UserError, match=r"data.split: p.txt has no split 'test'; valid are train"):
        open_prompts(Data(prompts=write_text(in_folder), split="test", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_without_text(in_folder: Path, streaming: bool) -> None:
    write_saved_splits(in_folder)
    with pytest.raises(UserError, match=r"data.prompts: splits has no text, only a"):
        open_prompts(Data(prompts="splits", split="rest", streaming=streaming))
    with pytest.raises(UserError, match=r"data.column: 'promt' of splits is not there; did you mean prompt\?"):
        open_prompts(Data(prompts="splits", column="promt", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_of_blanks(in_folder: Path, streaming: bool) -> None:
    datasets.Dataset.from_dict({"prompt": [" ", ""]}).to_parquet("p.parquet")
    with pytest.raises(UserError, match=r"data.prompts: p.parquet holds no prompt"):
        open_prompts(Data(prompts="p.parquet", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_dataset(in_folder: Path, streaming: bool) -> None:
    Path("p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a d')
    with pytest.raises(UserError, match=r"data.prompts: line 2 of p.jsonl is not JSON"):
        open_prompts(Data(prompts="p.jsonl", streaming=streaming))
    Path("folder").mkdir()
    Path("folder/picture.xyz").write_text("no data")
    with pytest.raises(UserError, match=r"data.prompts: folder cannot be read"):
        open_prompts(Data(prompts="folder", streaming=streaming))


def test_a_hub_name_that_cannot_be_had(in_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"data.prompts: nobody/no-such-prompts cannot be read"):
        open_prompts(Data(prompts="nobody/no-such-prompts"))


# -- our own


def test_evaluation_prompts() -> None:
    prompts = evaluation_prompts()
    assert len(prompts) == len(set(prompts)) == 64
    assert all(prompt == prompt.strip() and prompt.isascii() for prompt in prompts)
    assert min(map(len, prompts)) < 30
    assert max(map(len, prompts)) > 250
