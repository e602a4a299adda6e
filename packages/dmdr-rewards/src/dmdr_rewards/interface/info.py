"""Descriptions of the built-in rewards. Imports no torch, so that the command line can show them at once."""

import math
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class RewardInfo:
    """What a user should know about a reward before trusting its numbers.

    name          the name given to `dmdr_rewards.create`
    description   what the score is, as a formula if there is one
    range         lowest and highest score
    licence       licence of the weights
    source        publication of the model and of the score's definition
    prompt        the prompts that `score` takes: "text" (strings), "class_label" (integers) or "none" (not read)
    differentiable  whether gradients reach the pixels
    image_size    (height, width) of the network's input; None if it is not fixed
    preprocess    how pictures are resized and normalised, in words
    num_classes   number of class labels; None for text
    checkpoint    the checkpoint that `create` takes, in words; "none" for a reward without weights
    fetch         commands that download the official weights to where `checkpoint` expects them, or install the library
                  that holds them; "" if there are none
    endpoint      whether the reward asks a model over the network; its checkpoint is then that model's name, and
                  nothing is read from disk
    """

    name: str
    description: str
    range: tuple[float, float]
    licence: str
    source: str
    prompt: Literal["class_label", "text", "none"]
    differentiable: bool
    image_size: tuple[int, int] | None
    preprocess: str
    num_classes: int | None = None
    checkpoint: str = "none"
    fetch: str = ""
    endpoint: bool = False


_CLIP_PIXELS = "shorter side to 224, bicubic, antialias; centre crop 224x224; CLIP's mean and std"

_CLIP = RewardInfo(
    name="clip",
    description="cos(picture, prompt)",
    range=(-1.0, 1.0),
    licence="the checkpoint's",
    source="https://github.com/mlfoundations/open_clip, arXiv 2103.00020",
    prompt="text",
    differentiable=True,
    image_size=None,
    preprocess="the checkpoint's; usually shorter side, bicubic, centre crop, CLIP's mean and std",
    checkpoint=(
        "file of an open_clip model, with model=NAME (as open_clip.list_models()) or the path of its JSON; or a folder "
        "with open_clip_config.json and open_clip_model.safetensors or open_clip_pytorch_model.bin"
    ),
    fetch=(
        "hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K open_clip_config.json open_clip_pytorch_model.bin "
        "--local-dir clip"
    ),
)

_DFN_CLIP = replace(
    _CLIP,
    name="dfn-clip",
    description="cos(picture, prompt) by DFN5B-CLIP-ViT-H-14, with its QuickGELU",
    licence="Apple Sample Code License (apple-amlr for the weights)",
    source="https://huggingface.co/apple/DFN5B-CLIP-ViT-H-14, arXiv 2309.17425",
    image_size=(224, 224),
    preprocess="squash to 224x224, bicubic, antialias; CLIP's mean and std",
    checkpoint="open_clip_pytorch_model.bin (or .safetensors) of ViT-H-14, tag dfn5b; or the folder with it",
    fetch="hf download apple/DFN5B-CLIP-ViT-H-14 open_clip_pytorch_model.bin --local-dir dfn-clip",
)

_HPSV2 = replace(
    _CLIP,
    name="hpsv2.1",
    description="human preference: cos(picture, prompt) by a fine-tuned ViT-H-14",
    licence="Apache-2.0",
    source="https://github.com/tgxs002/HPSv2, arXiv 2306.09341",
    image_size=(224, 224),
    preprocess="longer side to 224, bicubic, antialias, on floats; zero pad to 224x224; CLIP's mean and std",
    checkpoint='HPS_v2.1_compressed.pt, {"state_dict": …} of an open_clip ViT-H-14; or the same as .safetensors',
    fetch="hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir .",
)

_PICKSCORE = replace(
    _CLIP,
    name="pickscore",
    description="human preference: exp(logit_scale) · cos(picture, prompt) by a fine-tuned CLIP ViT-H-14",
    range=(-math.inf, math.inf),
    licence="MIT",
    source="https://huggingface.co/yuvalkirstain/PickScore_v1, arXiv 2305.01569",
    image_size=(224, 224),
    preprocess=_CLIP_PIXELS,
    checkpoint=(
        "folder of a transformers CLIPModel: config.json, model.safetensors or pytorch_model.bin, tokenizer.json or "
        "vocab.json and merges.txt"
    ),
    fetch=(
        "hf download yuvalkirstain/PickScore_v1 config.json model.safetensors --local-dir pickscore && "
        "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K tokenizer.json tokenizer_config.json vocab.json merges.txt "
        "special_tokens_map.json --local-dir pickscore"
    ),
)

_IMAGEREWARD = replace(
    _PICKSCORE,
    name="imagereward",
    description="human preference: (mlp(BERT(prompt, picture)) - 0.1672) / 1.0333",
    licence="Apache-2.0",
    source="https://github.com/THUDM/ImageReward, arXiv 2304.05977",
    checkpoint="ImageReward.pt, with bert-base-uncased's vocab.txt beside it",
    fetch=(
        "hf download THUDM/ImageReward ImageReward.pt --local-dir imagereward && "
        "hf download google-bert/bert-base-uncased vocab.txt --local-dir imagereward"
    ),
)

_MPS = replace(
    _PICKSCORE,
    name="mps",
    description="human preference: exp(logit_scale) · cos(picture's tokens after attention to the prompt, prompt)",
    source="https://github.com/Kwai-Kolors/MPS, arXiv 2405.14705",
    licence="the release names none; MIT for its code",
    checkpoint=(
        "state dict of MPS as .safetensors, with config.json and the tokenizer's files of "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K beside it; or the folder that holds them; with condition=overall, "
        "aesthetics, alignment or detail"
    ),
    fetch=(
        "curl -L --create-dirs -o mps/MPS_overall_checkpoint.safetensors https://modelscope.cn/models/DiffSynth-Studio/"
        "QualityMetric_reward_pretrained/resolve/master/MPS_overall_checkpoint/"
        "MPS_overall_checkpoint_diffsynth.safetensors && "
        "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K config.json tokenizer.json tokenizer_config.json vocab.json "
        "merges.txt special_tokens_map.json --local-dir mps"
    ),
)

_HPSV3 = replace(
    _PICKSCORE,
    name="hpsv3",
    description="human preference: mlp(Qwen2-VL-7B(picture, question with the prompt)), the mean of its two outputs",
    source="https://github.com/MizzenAI/HPSv3, arXiv 2508.03789",
    image_size=None,
    preprocess="aspect ratio kept, sides multiples of 28, about 200704 pixels, bicubic, antialias; CLIP's mean and std",
    checkpoint=(
        "HPSv3.safetensors, with Qwen2-VL-7B-Instruct's config.json, tokenizer.json and tokenizer_config.json beside "
        "it; or the folder that holds them"
    ),
    fetch=(
        "hf download MizzenAI/HPSv3 HPSv3.safetensors --local-dir hpsv3 && "
        "hf download Qwen/Qwen2-VL-7B-Instruct config.json tokenizer.json tokenizer_config.json --local-dir hpsv3"
    ),
)

_AESTHETIC = replace(
    _PICKSCORE,
    name="aesthetic",
    description="how much people like a picture, about 1 to 10; the prompt is ignored",
    licence="Apache-2.0 (head), MIT (CLIP)",
    source="https://github.com/christophschuhmann/improved-aesthetic-predictor",
    prompt="none",
    checkpoint=(
        "OpenAI's CLIP ViT-L/14, in open_clip's format (file) or in transformers' (folder), with "
        "head=sac+logos+ava1-l14-linearMSE.pth; or a folder that holds both"
    ),
    fetch=(
        "hf download openai/clip-vit-large-patch14 config.json model.safetensors tokenizer.json tokenizer_config.json "
        "special_tokens_map.json vocab.json merges.txt --local-dir aesthetic && "
        "curl -L --output-dir aesthetic -o sac+logos+ava1-l14-linearMSE.pth https://github.com/christophschuhmann/"
        "improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
    ),
)

_CLASS_LABEL = RewardInfo(
    name="class-label",
    description="log-probability of the class label: -cross_entropy(logits, label)",
    range=(-math.inf, 0.0),
    licence="the checkpoint's",
    source="the checkpoint",
    prompt="class_label",
    differentiable=True,
    image_size=None,
    preprocess="as in the folder's preprocessor_config.json",
    checkpoint="folder of a transformers image classifier: config.json, *.safetensors, preprocessor_config.json",
    fetch=(
        "hf download google/vit-base-patch16-224 config.json model.safetensors preprocessor_config.json "
        "--local-dir classifier"
    ),
)

_DINOV2 = replace(
    _CLASS_LABEL,
    name="dinov2",
    description="log-probability of the class label by DINOv2: -cross_entropy(logits, label)",
    licence="Apache-2.0",
    source="https://github.com/facebookresearch/dinov2, arXiv 2304.07193",
    image_size=(224, 224),
    preprocess="squash to 224x224, bicubic, antialias; ImageNet's mean and std",
    checkpoint=(
        "torch.hub's files: dinov2_vitl14_pretrain.pth with head=dinov2_vitl14_linear4_head.pth; or a folder with "
        "backbone.* and head.*, .safetensors or .pth; or a folder of a transformers Dinov2ForImageClassification"
    ),
    fetch=(
        "curl -O https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth && "
        "curl -O https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_linear4_head.pth"
    ),
)

_VQASCORE = RewardInfo(
    name="vqascore",
    description='P("yes" | picture, does this figure show the prompt?) by a vision-language model over HTTP',
    range=(0.0, 1.0),
    licence="the model's",
    source="arXiv 2404.01291",
    prompt="text",
    differentiable=False,
    image_size=None,
    preprocess="none here: pictures are sent as they are",
    checkpoint="the model's name at the endpoint url=",
    endpoint=True,
)

_VLM_JUDGE = replace(
    _VQASCORE,
    name="vlm-judge",
    description="number from 0 to 10 in the answer of a vision-language model over HTTP",
    range=(0.0, 10.0),
    source="this package, whose template it uses",
)

_OCR = replace(
    _VQASCORE,
    name="ocr",
    description="share of the prompt's quoted text that a vision-language model over HTTP reads in the picture",
    source="arXiv 2505.05470",
)

_OCR_LOCAL = replace(
    _OCR,
    name="ocr-local",
    description="share of the prompt's quoted text that RapidOCR reads in the picture",
    licence="Apache-2.0",
    source="https://github.com/RapidAI/RapidOCR, arXiv 2505.05470",
    preprocess="RapidOCR's",
    checkpoint="none",
    fetch='pip install "dmdr-rewards[ocr]"',
    endpoint=False,
)

_GENEVAL = replace(
    _OCR,
    name="geneval",
    description="1 if a detector finds the prompt's objects in number, colour and position, otherwise 0",
    licence="the detector's and CLIP's",
    source="https://github.com/djghosh13/geneval, arXiv 2310.11513",
    preprocess="the detector's, and CLIP's for colours",
    checkpoint=(
        "folder of a transformers Mask2Former or object detector of COCO: config.json, *.safetensors, "
        "preprocessor_config.json; with metadata=evaluation_metadata.jsonl, clip=FOLDER for colours"
    ),
    fetch=(
        "hf download facebook/mask2former-swin-small-coco-instance config.json model.safetensors "
        "preprocessor_config.json --local-dir mask2former && hf download openai/clip-vit-large-patch14 config.json "
        "model.safetensors tokenizer.json --local-dir clip-l14 && curl -LO "
        "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
    ),
    endpoint=False,
)

_LOCAL_FILES = "config.json, *.safetensors, preprocessor_config.json, the tokenizer's files and its chat template"

_VQASCORE_LOCAL = replace(
    _VQASCORE,
    name="vqascore-local",
    description='P("yes" | picture, does this figure show the prompt?) by a Qwen-VL in this process',
    differentiable=True,
    preprocess="the folder's: aspect ratio kept, sides multiples of a patch, bicubic, antialias; its mean and std",
    checkpoint=f"folder of a transformers Qwen2-VL, Qwen2.5-VL or Qwen3-VL: {_LOCAL_FILES}",
    fetch="hf download Qwen/Qwen2.5-VL-7B-Instruct --local-dir qwen-vl",
    endpoint=False,
)

_UNIFIED_REWARD = replace(
    _VQASCORE_LOCAL,
    name="unified-reward",
    description="number from 1 to 5 in the answer of UnifiedReward, a Qwen-VL in this process",
    range=(1.0, 5.0),
    source="https://github.com/CodeGoat24/UnifiedReward, arXiv 2503.05236",
    differentiable=False,
    checkpoint=f"folder of UnifiedReward for Qwen2.5-VL in the format of transformers: {_LOCAL_FILES}",
    fetch="hf download CodeGoat24/UnifiedReward-qwen-7b --local-dir unified-reward",
)

BUILT_IN = {
    info.name: info
    for info in (
        _AESTHETIC,
        _CLASS_LABEL,
        _CLIP,
        _DFN_CLIP,
        _DINOV2,
        _GENEVAL,
        _HPSV2,
        _HPSV3,
        _IMAGEREWARD,
        _MPS,
        _OCR,
        _OCR_LOCAL,
        _PICKSCORE,
        _UNIFIED_REWARD,
        _VLM_JUDGE,
        _VQASCORE,
        _VQASCORE_LOCAL,
    )
}
"""The rewards of this package, by name."""
