"""Tiny models of the family Qwen-VL with random weights, in the file formats of the rewards that read them.

The tests compare the rewards with transformers on them, and `tools/bench tiny_rewards` measures what our code costs.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_CHAT = (  # of Qwen2-VL-Instruct, for messages of one picture and one text
    "{% for message in messages %}{% if loop.first %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer(folder: Path, words: tuple[str, ...] = ()) -> Any:
    """A tokenizer of Qwen2 that knows single bytes, these words and the model's own tokens, saved in a folder."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    entries = [*sorted(ByteLevel.alphabet()), *words]
    tokenizer = Qwen2Tokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_TOKENS})
    tokenizer.chat_template = QWEN_CHAT
    tokenizer.save_pretrained(folder)
    return tokenizer


def qwen_config(tokenizer: Any, words: int, kind: str = "qwen2_vl") -> Any:
    """A tiny model of the family, with patches as large as the real one's."""
    from transformers import AutoConfig

    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "vocab_size": words, "rope_parameters": rope}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision: dict[str, Any] = {"depth": 2, "hidden_size": 32, "num_heads": 2}
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
    elif kind == "qwen2_5_vl":
        vision |= {"out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [1]}
    else:
        text["head_dim"] = 16
        vision |= {"out_hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0]}
        vision["num_position_embeddings"] = 16
    tokens = {key: tokenizer.convert_tokens_to_ids(name) for key, name in names.items()}
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, **tokens)


def save_qwen(folder: Path, kind: str) -> Path:
    """A tiny model of the family with a language head, as transformers saves it."""
    from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessor

    tokenizer = qwen_tokenizer(folder, words=("Yes", "Ġyes", "Yesterday"))
    config = qwen_config(tokenizer, len(tokenizer), kind)
    patch = config.vision_config.patch_size
    processor = Qwen2VLImageProcessor(patch_size=patch, min_pixels=(4 * patch) ** 2, max_pixels=(6 * patch) ** 2)
    processor.save_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(config)
    randomise(model)
    model.eval().save_pretrained(folder)
    return folder


def save_hpsv3(folder: Path) -> Path:
    """The files that `describe("hpsv3").fetch` downloads, tiny."""
    from transformers import Qwen2VLForConditionalGeneration

    tokenizer = qwen_tokenizer(folder)
    words = len(tokenizer) + 1
    config = qwen_config(tokenizer, words=words + 40)  # the release cuts unused rows of the vocabulary
    config.save_pretrained(folder)
    config.text_config.vocab_size = words
    model = Qwen2VLForConditionalGeneration(config)
    head = nn.Sequential(nn.Linear(32, 1024), nn.ReLU(), nn.Dropout(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))
    randomise(model)
    randomise(head, seed=1)
    old = {"model.language_model.": "model.", "model.visual.": "visual."}
    tensors = {f"rm_head.{name}": tensor for name, tensor in head.state_dict().items()}
    for name, tensor in model.state_dict().items():
        prefix = next((prefix for prefix in old if name.startswith(prefix)), "")
        tensors[old.get(prefix, "") + name.removeprefix(prefix)] = tensor.contiguous()
    save_file(tensors, folder / "HPSv3.safetensors")
    return folder


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Every tensor gets a say: layer scales and biases as published starts are ones and zeros, which hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + noise.abs() if name.endswith("running_var") else 0.3 * noise)
