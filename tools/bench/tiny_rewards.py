"""Measure what our code adds to a reward's network: rewards whose networks are tiny, with random weights.

    python tools/bench tiny_rewards

The networks have two layers and 32 channels, so the times are those of preprocessing, questions, packing and the
overhead of each call. They say nothing about networks of 7 billion parameters.

It compares, per picture and on the CPU:

    reward      the reward's score() of pictures of 8 bits
    peer        transformers' own processor, tokenizer and model on the same files, called as its documentation says,
                with the same batch, questions and pictures; for hpsv3 without the release's head, for mps without
                what it puts on its CLIP
    gradient    score() of a tensor of floats, and backward, where the reward is differentiable

ocr-local has no stand-in: RapidOCR's own weights are measured, if it is installed.
"""

import importlib.util
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dmdr_rewards
import numpy as np
import torch
from dmdr_rewards.judges.local import UnifiedReward
from dmdr_rewards.models import hpsv3
from PIL import Image, ImageDraw
from tiny_mps import save_mps
from tiny_qwen import save_hpsv3, save_qwen

from bench.common import fastest, options_of, print_table

PROMPT = 'a dog beside a sign that says "SALE"'
Work = Callable[[], object]
Case = tuple[Any, Work | None]
"""A reward, and its peer if it has one."""


def pictures_of(count: int, side: int) -> list[Image.Image]:
    """Smooth noise with a word on it."""
    found = []
    for seed in range(count):
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        found.append(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
        ImageDraw.Draw(found[-1]).text((side // 8, side // 3), "SALE", fill="white", font_size=side // 6)
    return found


def qwen_inputs(tokenizer: Any, processor: Any, pictures: list[Image.Image], question: str, tail: str) -> Any:
    """Inputs of a Qwen-VL by transformers' processor, chat template and tokenizer; pictures of one size."""
    inputs = dict(processor(images=pictures, return_tensors="pt"))
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    text = text[: text.index(tail) + len(tail)] if tail else text
    pads = "<|image_pad|>" * (int(inputs["image_grid_thw"][0].prod()) // 4)
    tokens = tokenizer([text.replace("<|image_pad|>", pads)] * len(pictures), return_tensors="pt")
    types = (tokens["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    return {**tokens, **inputs, "mm_token_type_ids": types}


def hpsv3_case(folder: Path, pictures: list[Image.Image]) -> Case:
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    reward = dmdr_rewards.create("hpsv3", save_hpsv3(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [hpsv3.REWARD]})
    processor = Qwen2VLImageProcessorPil(min_pixels=hpsv3.AREA, max_pixels=hpsv3.AREA)
    model = Qwen2VLModel(AutoConfig.from_pretrained(folder)).eval()
    question = hpsv3.QUESTION.replace("{prompt}", PROMPT) + hpsv3.REWARD

    @torch.inference_mode()
    def peer() -> object:
        return model(**qwen_inputs(tokenizer, processor, pictures, question, hpsv3.REWARD), use_cache=False)

    return reward, peer


def mps_case(folder: Path, pictures: list[Image.Image]) -> Case:
    """At 224 pixels, as the real one's. The reward remembers texts, so the peer reads the text only once too."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    reward = dmdr_rewards.create("mps", save_mps(folder, side=224, patch=14))
    model = CLIPModel(CLIPConfig.from_pretrained(folder)).eval()
    tensors = load_file(folder / "MPS_overall_checkpoint.safetensors")
    model.load_state_dict({n.removeprefix("model."): each for n, each in tensors.items() if n.startswith("model.")})
    processor = CLIPImageProcessorPil()
    tokens = AutoTokenizer.from_pretrained(folder)([PROMPT], padding="max_length", max_length=77, return_tensors="pt")
    with torch.inference_mode():
        text = model.get_text_features(**tokens).pooler_output

    @torch.inference_mode()
    def peer() -> object:
        found = model.get_image_features(**processor(pictures, return_tensors="pt")).pooler_output
        return torch.cosine_similarity(found, text)

    return reward, peer


def chat_model(folder: Path) -> tuple[Any, Any, Any]:
    """A tiny Qwen2-VL whose pictures are as large as the real one's; transformers' tokenizer, processor and model."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    save_qwen(folder, "qwen2_vl")
    Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=1280 * 28 * 28).save_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder), model


def vqascore_case(folder: Path, pictures: list[Image.Image]) -> Case:
    tokenizer, processor, model = chat_model(folder)
    question = f'Does this figure show "{PROMPT}"? Please answer yes or no.'

    @torch.inference_mode()
    def peer() -> object:
        inputs = qwen_inputs(tokenizer, processor, pictures, question, "")
        return model(**inputs, use_cache=False, logits_to_keep=1).logits.softmax(dim=-1)

    return dmdr_rewards.create("vqascore-local", folder), peer


def unified_case(folder: Path, pictures: list[Image.Image]) -> Case:
    """A random network writes no score, so its answer is read in vain, and `fallback` counts."""
    tokenizer, processor, model = chat_model(folder)
    question = UnifiedReward.template.replace("{prompt}", PROMPT)

    @torch.inference_mode()
    def peer() -> object:
        longest = UnifiedReward.request["max_tokens"]
        inputs = [qwen_inputs(tokenizer, processor, [picture], question, "") for picture in pictures]
        return [model.generate(**each, do_sample=False, max_new_tokens=longest) for each in inputs]

    return dmdr_rewards.create("unified-reward", folder, fallback=1.0), peer


def geneval_case(folder: Path, pictures: list[Image.Image]) -> Case:
    """A YOLOS at 512 pixels for the detector: no masks, and no colours in the task."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=[512, 512],
        num_detection_tokens=100, use_mid_position_embeddings=False, id2label={0: "dog", 1: "cat"},
    )  # fmt: skip
    model = YolosForObjectDetection(config).eval()
    model.save_pretrained(folder)
    processor = YolosImageProcessor(size={"height": 512, "width": 512})
    processor.save_pretrained(folder)
    row = {"prompt": PROMPT, "tag": "single_object", "include": [{"class": "dog", "count": 1}]}
    (folder / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")

    @torch.inference_mode()
    def peer() -> object:
        found = []
        for picture in pictures:
            outputs = model(**processor(images=picture, return_tensors="pt"))
            sizes = [(picture.height, picture.width)]
            found += processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=sizes)
        return found

    return dmdr_rewards.create("geneval", folder, metadata=folder / "rows.jsonl"), peer


def ocr_case(folder: Path, pictures: list[Image.Image]) -> Case | str:
    if importlib.util.find_spec("rapidocr_onnxruntime") is None:
        return "not timed: dmdr-rewards[ocr] is not installed"
    return dmdr_rewards.create("ocr-local"), None


CASES = {
    "hpsv3": hpsv3_case,
    "mps": mps_case,
    "vqascore-local": vqascore_case,
    "unified-reward": unified_case,
    "geneval": geneval_case,
    "ocr-local": ocr_case,
}


def row(name: str, case: Case | str, pictures: list[Image.Image], repeats: int) -> list[object]:
    """The row of a reward: ms per picture of the reward and its peer, their ratio, and ms with gradient."""
    if isinstance(case, str):
        return [name, case, "–", "–", "–"]
    reward, peer = case
    prompts = [PROMPT] * len(pictures)
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    leaf = (torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255).requires_grad_()
    works: dict[str, Work] = {"reward": lambda: reward.score(pictures, prompts)}
    if peer is not None:
        works["peer"] = peer
    if reward.info.differentiable:
        works["gradient"] = lambda: torch.autograd.grad(reward.score(leaf, prompts).sum(), leaf)
    found = {each: seconds * 1e3 / len(pictures) for each, seconds in fastest(works, repeats).items()}
    ratio = found["reward"] / found["peer"] if peer is not None else "–"
    return [name, found["reward"], found.get("peer", "–"), ratio, found.get("gradient", "–")]


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--pictures", type=int, default=4, help="number of pictures, one batch")
    parser.add_argument("--side", type=int, default=512, help="side of the pictures, in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    pictures = pictures_of(options.pictures, options.side)
    rows = []
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, case(Path(folder), pictures), pictures, options.repeats))
    print(f"tiny random networks on the CPU, {torch.get_num_threads()} threads, {options.pictures} pictures of "
          f"{options.side}x{options.side}, torch {torch.__version__}\n")  # fmt: skip
    print_table(["reward", "ms per picture", "ms, transformers alone", "ratio", "ms, with gradient"], rows)


if __name__ == "__main__":
    main()
