"""Names in users' files cannot lead out of the folder of these files."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dmdr_rewards.base.errors import UserError as ScoreError
from dmdr_rewards.base.safe_reading import inside, open_rgb
from dmdr_rewards.score.sources import find, open_picture
from dmdr_train.base.atomic_files import fingerprint
from dmdr_train.base.errors import UserError
from dmdr_train.checkpoint.manifest import signed, verify
from dmdr_train.data.embedding_cache import EmbeddingCache, cache_folder
from dmdr_train.data.encode import plan
from PIL import Image

OUTSIDE = ["../secret.png", "a/../../secret.png", "/etc/secret.png", "a/../..", "x\0.png"]


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (2, 2)).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("folder", ["data", "data/", ".", "/data/here"])
def test_a_name_that_leads_out_is_refused(name: str, folder: str) -> None:
    with pytest.raises(ValueError, match="leads out of"):
        inside(Path(folder), name)


@pytest.mark.parametrize("name", ["a.png", "a/b.png", "./a.png", "a/../b.png", "..a/b..png", ""])
def test_a_name_that_stays_is_taken(name: str) -> None:
    assert inside(Path("data"), name) == Path("data") / name


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png"])
def test_a_table_names_pictures_of_its_folder_alone(ending: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    table = folder / f"t.{ending}"
    if ending == "jsonl":
        table.write_text(json.dumps({"file_name": name}))
    elif ending == "csv":
        table.write_text(f"file_name\n{name}\n")
    else:
        pq.write_table(pa.table({"file_name": [name]}), table)
    with pytest.raises(ScoreError, match=r"^IMAGES: .*t\.\w+: .*leads out of .*; put the table above its pictures"):
        find(str(table))


def test_a_picture_in_a_table_is_found_beside_it_alone(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "a.png").write_bytes(png())
    rows = [{"image": {"bytes": None, "path": path}} for path in ("a.png", "../a.png", str(tmp_path / "a.png"))]
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    beside, *others = find(str(folder / "t.parquet"))
    assert open_picture(beside.source).size == (2, 2)
    for item in others:
        with pytest.raises(ValueError, match="leads out of"):
            open_picture(item.source)


@pytest.mark.parametrize(
    "name",
    ["../keep.safetensors", "/keep.safetensors", "a/b.safetensors", "recipe.yaml", "..", f"{'x' * 300}.safetensors"],
)
def test_a_manifest_cannot_have_files_deleted(name: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "a").mkdir(parents=True)
    for kept in ("keep.safetensors", "cache/a/b.safetensors", "cache/recipe.yaml"):
        (tmp_path / kept).write_bytes(b"not as long as the manifest says")
    name = str(tmp_path / "keep.safetensors") if name.startswith("/") else name
    entry = {"bytes": 1, "prompts": 1}
    (cache / "manifest.json").write_text(json.dumps({"shards": {name: entry}}))
    before = sorted(tmp_path.rglob("*"))
    uses: list[Any] = [
        lambda: cache_folder("--output", cache).remove_damaged(),
        lambda: plan(cache_folder("--output", cache), None, 1),
        lambda: EmbeddingCache(cache),
        lambda: cache_folder("data.embeddings", cache).manifest(),
    ]
    for use in uses:
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            use()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "generator/../../outside"])
def test_a_checkpoint_names_its_own_files_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"")
    (folder := tmp_path / "step-00000001").mkdir()
    manifest = {"step": 1, "world_size": 1, "weights": {}, "files": {name: fingerprint(tmp_path / "outside")}}
    (folder / "manifest.json").write_text(json.dumps(signed(manifest)))
    with pytest.raises(UserError, match=r"^run\.resume: .* leads out of .*step-00000001"):
        verify("run.resume", folder)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "PCX"])
def test_only_usual_pictures_are_decoded(kind: str, tmp_path: Path) -> None:
    """An EPS is refused whatever its name, since Pillow would pass it to another program."""
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(path, kind)
    with pytest.raises(OSError, match="cannot identify"):
        open_rgb(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_usual_pictures_are(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "a", kind)
    assert open_rgb(tmp_path / "a").mode == "RGB"
