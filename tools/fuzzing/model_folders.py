"""Model folders and adapters."""

import json
from pathlib import Path

from hypothesis import strategies as st

from fuzzing.examples import (
    Target,
    as_json,
    as_safetensors,
    texts,
)
from fuzzing.training_files import recipe_base


def model() -> Target:
    """A model's folder and an adapter, up to the checks before torch is imported."""
    from dmdr_models import registry
    from dmdr_models.folder.adapter_files import check_adapter
    from dmdr_models.folder.contents import describe
    from dmdr_train.base.errors import naming

    home = Path(recipe_base()["model"]["path"])
    files = [path for path in home.rglob("*") if path.is_file()]
    names = [str(path.relative_to(home)) for path in files if path.suffix == ".json" and "tokenizer" not in path.name]
    network = "transformer/diffusion_pytorch_model.safetensors"
    adapter = {"adapter_config.json": {"peft_type": "LORA", "r": 4}, "adapter_model.safetensors": ADAPTER}
    index = {"metadata": {}, "weight_map": {"a": "shard.safetensors"}}
    content = {
        **{name: texts(json.loads((home / name).read_bytes()), as_json) for name in names},
        f"{network}.index.json": texts(index, as_json),
        network: texts(ADAPTER, as_safetensors),
        "adapter_config.json": texts(adapter["adapter_config.json"], as_json),
        "adapter_model.safetensors": texts(ADAPTER, as_safetensors),
    }

    def read(example: tuple[str, bytes], folder: Path) -> None:
        for path in files:
            target = folder / path.relative_to(home)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(path)
        (folder / "adapter_config.json").write_bytes(as_json(adapter["adapter_config.json"]))
        (folder / "adapter_model.safetensors").write_bytes(as_safetensors(ADAPTER))
        (folder / example[0]).unlink(missing_ok=True)
        (folder / example[0]).write_bytes(example[1])
        with naming("--model"):
            describe(registry.find("sd3"), folder, sizes=[(32, 32)])
            check_adapter(folder, None)

    return st.one_of(st.tuples(st.just(name), each) for name, each in content.items()), read


ADAPTER = {
    f"base_model.model.to_q.{side}.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    for side in ("lora_A", "lora_B")
}
