"""Every place that loads a file refuses a pickle that would run code, in one line that names the file.

For a new place, add a line to PLACES: its name, and a function that puts the trap there and loads it. For a place that
could run Python code from a model's folder, add a line to CODE.
"""

import json
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import dmdr_models
import dmdr_rewards
import pytest
import torch
from dmdr_models import registry
from dmdr_models.folder.adapter_files import check_adapter
from dmdr_models.folder.checks import STATE_DICTS
from dmdr_models.folder.contents import describe
from dmdr_models.generate import main as generate
from dmdr_models.sit.convert import read_checkpoint
from dmdr_rewards.score.prompts import with_prompts
from dmdr_rewards.score.sources import find, open_picture
from dmdr_train.base.errors import naming
from dmdr_train.checkpoint import load
from dmdr_train.checkpoint.load import load_weights
from dmdr_train.data.embedding_cache import EmbeddingCache
from dmdr_train.data.prompt_files import check_prompts, open_prompts
from dmdr_train.recipe.schema import Data
from safetensors import SafetensorError

Copy = Callable[[str], Path]
Place = Callable[[Any, Copy, Path], Any]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def reward(name: str, file: str, **options: Any) -> Place:
    """Load a reward whose checkpoint, or a file in its folder, is the trap."""

    def place(trap: Any, copied: Copy, folder: Path) -> Any:
        path = trap(folder / file)
        (folder / "config.json").write_text('{"model_type": "clip"}')
        (folder / "tokenizer.json").write_text("{}")
        return dmdr_rewards.create(name, path.parent if "/" in file else path, **options)

    return place


def dinov2_head(trap: Any, copied: Copy, folder: Path) -> Any:
    torch.save({"a": torch.zeros(1)}, folder / "backbone.pth")
    return dmdr_rewards.create("dinov2", folder / "backbone.pth", head=trap(folder / "head.pth"))


def aesthetic_head(trap: Any, copied: Copy, folder: Path) -> Any:
    from dmdr_rewards.models.aesthetic import _head

    return _head(trap(folder / "head.pth"))


def classifier(trap: Any, copied: Copy, folder: Path) -> Any:
    model = copied("classifier")
    (model / "model.safetensors").unlink()
    trap(model / "pytorch_model.bin")
    return dmdr_rewards.create("class-label", model)


def part(family: str, name: str, load: Callable[[Path], Any]) -> Place:
    """Load a part of a model's folder whose only weights are the trap."""

    def place(trap: Any, copied: Copy, folder: Path) -> Any:
        model = copied(family)
        [weights] = (model / name).glob("*.safetensors")
        weights.unlink()
        trap(model / name / ("pytorch_model.bin" if weights.stem == "model" else f"{weights.stem}.bin"))
        return load(model)

    return place


def in_disguise(trap: Any, copied: Copy, folder: Path) -> Any:
    model = copied("sit")
    trap(model / "transformer" / WEIGHTS)
    return dmdr_models.load("sit", model).load_network()


def shard(trap: Any, copied: Copy, folder: Path) -> Any:
    """Load an index of safetensors that names a pickle."""
    model = copied("sit")
    (model / "transformer" / WEIGHTS).rename(model / "transformer/kept.safetensors")
    trap(model / "transformer/evil.bin")
    index = {"metadata": {}, "weight_map": {"pos_embed": "evil.bin"}}
    (model / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return dmdr_models.load("sit", model).load_network()


def elsewhere(trap: Any, copied: Copy, folder: Path) -> Any:
    model = copied("sit")
    trap(folder / "network/diffusion_pytorch_model.bin")
    (folder / "network/config.json").write_text((model / "transformer/config.json").read_text())
    return dmdr_models.load("sit", model).load_network(folder / "network")


def state_dict(name: str) -> Place:
    return lambda trap, copied, folder: (dmdr_models.load("sdxl", copied("sdxl")).load_network(trap(folder / name)),)


def other_vae(trap: Any, copied: Copy, folder: Path) -> Any:
    model = copied("sit")
    trap(folder / "vae/diffusion_pytorch_model.bin")
    (folder / "vae/config.json").write_text((model / "vae/config.json").read_text())
    return dmdr_models.load("sit", model, vae=folder / "vae").vae


def adapter(trap: Any, copied: Copy, folder: Path) -> Any:
    trap(folder / "adapter/adapter_model.bin")
    (folder / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    return check_adapter(folder / "adapter", None)


def resumed(trap: Any, copied: Copy, folder: Path) -> Any:
    return load._load_weights_only(str(trap(folder / "mp_rank_00_model_states.pt")))


def init_from(trap: Any, copied: Copy, folder: Path) -> Any:
    return load_weights("run.init_from", trap(folder / "generator.safetensors"), torch.nn.Linear(1, 1))


def embeddings(trap: Any, copied: Copy, folder: Path) -> Any:
    size = trap(folder / "shard-0.safetensors").stat().st_size
    entry = {"prompts": 1, "bytes": size}
    (folder / "manifest.json").write_text(json.dumps({"shards": {"shard-0.safetensors": entry}}))
    with naming("data.embeddings"):
        return EmbeddingCache(folder)


def prompts(ending: str, read: Callable[[Data], Any]) -> Place:
    return lambda trap, copied, folder: read(Data(prompts=str(trap(folder / f"prompts{ending}"))))


def table(ending: str) -> Place:
    def place(trap: Any, copied: Copy, folder: Path) -> Any:
        (folder / "a.png").write_bytes(b"")
        return with_prompts(find(str(folder / "a.png")), str(trap(folder / f"prompts{ending}")))

    return place


PLACES: dict[str, Place] = {
    "reward clip": reward("clip", "clip.bin", model="ViT-B-32"),
    "reward clip, a folder": reward("clip", "clip/open_clip_pytorch_model.bin", model="ViT-B-32"),
    "reward dfn-clip": reward("dfn-clip", "dfn.bin"),
    "reward hpsv2.1": reward("hpsv2.1", "hps.pt"),
    "reward pickscore": lambda trap, copied, folder: reward("pickscore", "pytorch_model.bin")(trap, copied, folder),
    "reward mps": reward("mps", "MPS_overall_checkpoint.pth"),
    "reward imagereward": reward("imagereward", "ImageReward.pt"),
    "reward aesthetic": reward("aesthetic", "clip.pt", head="head.pth"),
    "reward aesthetic, head": aesthetic_head,
    "reward dinov2": reward("dinov2", "backbone.pth", head="head.pth"),
    "reward dinov2, head": dinov2_head,
    "reward class-label": classifier,
    **{
        f"{layout.name}, {name}": part(layout.name, name, lambda model, layout=layout: describe(layout, model))
        for layout in registry.layouts()
        for name in layout.parts
        if name != "scheduler"
    },
    "sit, its network": part("sit", "transformer", lambda model: dmdr_models.load("sit", model).load_network()),
    "sit, its VAE": part("sit", "vae", lambda model: dmdr_models.load("sit", model).vae),
    "sd3, its texts": part("sd3", "text_encoder_2", lambda model: dmdr_models.load("sd3", model).condition(["a"])),
    "sdxl, its texts": part("sdxl", "text_encoder", lambda model: dmdr_models.load("sdxl", model).condition(["a"])),
    "a pickle called safetensors": in_disguise,
    "a pickle in an index": shard,
    "model.generator": elsewhere,
    **{f"model.generator, a file {ending}": state_dict(f"unet{ending}") for ending in STATE_DICTS},
    "model.vae": other_vae,
    "--adapter": adapter,
    "a LoRA in one file": lambda trap, copied, folder: dmdr_models.load("sdxl", copied("sdxl")).read_lora(
        trap(folder / "style.safetensors")
    ),
    "a LoRA of another ending": lambda trap, copied, folder: check_adapter(trap(folder / "style.bin")),
    "a published SiT": lambda trap, copied, folder: read_checkpoint(trap(folder / "sit.pt")),
    "run.resume": resumed,
    "run.init_from": init_from,
    "data.embeddings": embeddings,
    **{f"data.prompts {ending}": prompts(ending, check_prompts) for ending in (".txt", ".csv", ".jsonl", ".parquet")},
    **{f"data.prompts {ending}, opened": prompts(ending, open_prompts) for ending in (".jsonl", ".parquet")},
    **{f"--prompts {ending}": table(ending) for ending in (".csv", ".jsonl", ".parquet")},
    "a picture": lambda trap, copied, folder: open_picture(trap(folder / "a.png")),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_pickle_is_refused_unrun(place: str, trap: Any, copied: Copy, tmp_path: Path) -> None:
    (folder := tmp_path / "files").mkdir()
    with pytest.raises((ValueError, OSError)) as caught:
        PLACES[place](trap, copied, folder)
    assert not trap.mark.exists()
    assert not isinstance(caught.value, SafetensorError)
    line = str(caught.value)
    assert str(tmp_path) in line or place == "a picture", line
    assert "weights_only" not in line, "torch's own advice is to run the code"
    assert "\n" not in line, line


def test_the_trap_works(trap: Any, tmp_path: Path) -> None:
    path = trap(tmp_path / "evil.bin")
    if trap.zipped:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trap.mark.exists()


# -- a folder that contains Python code and names it in a config


def auto_map(model: str, config: str, *classes: str) -> Place:
    def place(trap: Any, copied: Copy, folder: Path) -> Path:
        path = copied(model)
        content = json.loads((path / config).read_text()) if (path / config).exists() else {}
        content["auto_map"] = dict.fromkeys(classes, "evil.Evil")
        (path / config).write_text(json.dumps(content))
        trap.module((path / config).parent / "evil.py")
        return path

    return place


def index(name: str, entry: Any) -> Place:
    """Load a pipeline whose index names a class in the folder."""

    def place(trap: Any, copied: Copy, folder: Path) -> Path:
        path = copied("sd3")
        content = json.loads((path / "model_index.json").read_text())
        (path / "model_index.json").write_text(json.dumps({**content, name: entry}))
        trap.module(path / "transformer/evil.py")
        trap.module(path / "evil.py")
        return path

    return place


@pytest.mark.parametrize(("name", "entry"), [("transformer", ["evil", "Evil"]), ("_class_name", ["evil", "Evil"])])
def test_an_index_that_asks_for_code_is_refused_before_anything_is_loaded(
    name: str, entry: Any, code: Any, copied: Copy, tmp_path: Path
) -> None:
    path = index(name, entry)(code, copied, tmp_path)
    with pytest.raises(ValueError, match=f"model_index.json asks for other code: {name} is of 'evil'"):
        describe(registry.find("sd3"), path)


def script(trap: Any, copied: Copy, folder: Path) -> Path:
    trap.module(folder / f"{folder.name}.py")
    return folder


def pickled_rows(trap: Any, copied: Copy, folder: Path) -> Path:
    trap(folder / "train.pkl")
    return folder


def draw(model: Path) -> None:
    output = model.parent / "out.png"
    generate(["--family", "sd3", "--model", str(model), "a", "-o", str(output), "--steps", "1", "--max-tokens", "4"])


def sd3_texts(model: Path) -> None:
    dmdr_models.load("sd3", model).condition(["a"])


def open_folder(folder: Path) -> None:
    open_prompts(Data(prompts=str(folder)))


CODE: dict[str, tuple[Place, Callable[[Path], Any]]] = {
    "an image classifier": (
        auto_map("classifier", "config.json", "AutoConfig", "AutoModelForImageClassification"),
        lambda path: dmdr_rewards.create("class-label", path),
    ),
    "a network": (
        auto_map("sit", "transformer/config.json", "AutoModel"),
        lambda path: dmdr_models.load("sit", path).load_network(),
    ),
    "a VAE": (auto_map("sit", "vae/config.json", "AutoModel"), lambda path: dmdr_models.load("sit", path).vae),
    "a text encoder": (auto_map("sd3", "text_encoder/config.json", "AutoConfig", "AutoModel"), sd3_texts),
    "a tokenizer": (auto_map("sd3", "tokenizer/tokenizer_config.json", "AutoTokenizer"), sd3_texts),
    "a part of a pipeline": (index("transformer", ["evil", "Evil"]), draw),
    "a pipeline": (index("_class_name", ["evil", "Evil"]), draw),
    "a loading script": (script, open_folder),
    "pickled rows": (pickled_rows, open_folder),
}


@pytest.mark.parametrize("place", CODE)
def test_code_in_a_folder_is_not_run(place: str, code: Any, copied: Copy, tmp_path: Path) -> None:
    (folder := tmp_path / "files").mkdir()
    prepare, load = CODE[place]
    path = prepare(code, copied, folder)
    with suppress(ValueError, OSError, SystemExit):
        load(path)
    assert not code.mark.exists()
