"""The rewards of a recipe on torch's meta device, at the sizes of the published models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dmdr_rewards
import torch
from dmdr_rewards.networks.clip_towers import open_clip_config, vision_layers
from dmdr_rewards.networks.frozen_network import ROUNDED, precision, recompute
from dmdr_rewards.networks.word_attention import WordAttention
from torch import Tensor, nn

from dmdr_train.base.errors import naming
from dmdr_train.distributed.device import DTYPES
from dmdr_train.planning.counting import Cost, cost, count_of
from dmdr_train.recipe.schema import Reward

META = torch.device("meta")
CLIPS = {"dfn-clip": "ViT-H-14", "hpsv2.1": "ViT-H-14", "pickscore": "ViT-H-14", "clip": "ViT-L-14"}
SIDE = 224
NOTHING = Cost(0)


@dataclass(frozen=True)
class RewardCost:
    """A reward's size and what it costs to score one picture.

    Attributes:
        parameters: number of its parameters.
        weights: their bytes.
        image: of the picture's side, with the gradient at the pixels.
        text: operations for one text.
    """

    parameters: int = 0
    weights: int = 0
    image: Cost = NOTHING
    text: int = 0


def reward_cost(key: str, reward: Reward, checkpointing: bool) -> RewardCost | None:
    """Count a reward; None for a reward of a plug-in, whose size is unknown.

    Raises:
        UserError: the files of the reward say something impossible; names `key`.
    """
    with naming(key):
        if dmdr_rewards.describe(reward.name).endpoint:
            return RewardCost()
        dtype = DTYPES[reward.precision]
        with META:
            if reward.name in CLIPS or reward.name == "aesthetic":
                return clip(reward, dtype, checkpointing)
            builders: Any = {"class-label": class_label, "dinov2": dinov2, "imagereward": imagereward, "mps": mps}
            return builders[reward.name](reward, dtype, checkpointing) if reward.name in builders else None


def counted(module: nn.Module, dtype: torch.dtype, image: Any, text: Any = None, side: int = SIDE) -> RewardCost:
    """Count a module that computes in `dtype`."""
    nn.Module.to(module, dtype).requires_grad_(False).eval()
    pixels = torch.empty(1, 3, side, side, dtype=dtype, requires_grad=True)
    texts = cost(text).forward if text else 0
    return RewardCost(count_of(module), weight_bytes(module, dtype), cost(lambda: image(pixels), backward=True), texts)


def weight_bytes(module: nn.Module, dtype: torch.dtype) -> int:
    """The bytes of the weights as `dmdr_rewards.networks.frozen_network.FrozenNetwork` keeps them."""
    kept = precision(dtype).itemsize
    layers = [layer for layer in module.modules() if isinstance(layer, ROUNDED)]
    rounded = sum(parameter.numel() for layer in layers for parameter in layer.parameters(recurse=False))
    return count_of(module) * kept - rounded * (kept - dtype.itemsize)


def clip(reward: Reward, dtype: torch.dtype, checkpointing: bool) -> RewardCost:
    """Count a CLIP of open_clip; without the text tower where the reward reads no texts."""
    import open_clip

    given = str(reward.options.get("model", CLIPS.get(reward.name, "ViT-L-14")))
    config = {k: v for k, v in open_clip_config(given).items() if k != "custom_text"}
    model: Any = open_clip.CLIP(**config)
    if checkpointing:
        model.visual.set_grad_checkpointing()
    side = model.visual.image_size
    side = side[0] if isinstance(side, tuple) else side

    def text() -> Tensor:
        return model.encode_text(torch.empty(1, model.context_length, dtype=torch.long))

    return counted(model, dtype, model.encode_image, None if reward.name == "aesthetic" else text, side)


def class_label(reward: Reward, dtype: torch.dtype, checkpointing: bool) -> RewardCost:
    """Count the classifier in the reward's folder, or ViT-B/16 where there is none."""
    from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig

    place = Path(reward.checkpoint or "no checkpoint")
    config: Any = ViTConfig()
    config.num_labels = 1000
    if (place / "config.json").is_file():
        config = AutoConfig.from_pretrained(place, local_files_only=True)
    loader: Any = AutoModelForImageClassification
    model = loader.from_config(config)
    side = getattr(config, "image_size", None) or SIDE
    return counted(model, dtype, lambda pixels: model(pixel_values=pixels).logits, side=side)


def dinov2(reward: Reward, dtype: torch.dtype, checkpointing: bool) -> RewardCost:
    """Count DINOv2 ViT-L/14 and its head of four layers."""
    from transformers import Dinov2Config, Dinov2Model

    side = int(reward.options.get("image_size") or SIDE)
    config = Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, patch_size=14, image_size=side
    )
    model: Any = Dinov2Model(config)
    if checkpointing:
        recompute(model.encoder.layer)
    whole = nn.ModuleDict({"model": model, "head": nn.Linear(5 * config.hidden_size, 1000)})

    def image(pixels: Tensor) -> Tensor:
        tokens = model(pixels).last_hidden_state
        return whole["head"](torch.cat([tokens[:, 0]] * 4 + [tokens[:, 1:].mean(dim=1)], dim=1))

    return counted(whole, dtype, image, side=side)


def imagereward(reward: Reward, dtype: torch.dtype, checkpointing: bool) -> RewardCost:
    """Count BLIP's ViT-L/16, and BERT-base that reads the text and looks at the picture."""
    from timm.models.vision_transformer import VisionTransformer
    from transformers import BlipTextConfig, BlipTextModel

    vision: Any = VisionTransformer(SIDE, 16, embed_dim=1024, depth=24, num_heads=16, num_classes=0, global_pool="")
    reader: Any = BlipTextModel(BlipTextConfig(encoder_hidden_size=1024), add_pooling_layer=False)
    if checkpointing:
        vision.set_grad_checkpointing()
    words = torch.empty(1, 35, dtype=torch.long)

    def image(pixels: Tensor) -> Tensor:
        seen = vision(pixels)
        return reader(
            input_ids=words, attention_mask=torch.ones_like(words), encoder_hidden_states=seen, is_decoder=False
        ).last_hidden_state

    return counted(nn.ModuleDict({"vision": vision, "text": reader}), dtype, image)


def mps(reward: Reward, dtype: torch.dtype, checkpointing: bool) -> RewardCost:
    """Count CLIP ViT-H-14 and the four layers that read the tokens of its picture and its text."""
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    config = CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 14}, projection_dim=1024)
    model: Any = CLIPModel(config)
    reader = WordAttention(1024, depth=4, heads=16)
    if checkpointing:
        recompute([*vision_layers(model), *reader.blocks()])
    ids = torch.empty(1, 77, dtype=torch.long)

    def image(pixels: Tensor) -> Tensor:
        tokens = model.visual_projection(model.vision_model(pixel_values=pixels).last_hidden_state)
        return reader(tokens, torch.empty(1, 77, 1024, dtype=dtype), torch.empty(1, 77, dtype=torch.bool))

    def words() -> Tensor:
        return model.text_projection(model.text_model(input_ids=ids).last_hidden_state)

    return counted(nn.ModuleDict({"clip": model, "reader": reader}), dtype, image, words)


def lpips_cost(height: int, width: int) -> RewardCost:
    """Count LPIPS: VGG16's convolutions on the picture with gradient and on the target without, in float32."""
    from torchvision.models import vgg16

    with META:
        features = vgg16().features
        found = counted(features, torch.float32, features)
        picture = torch.empty(1, 3, height, width, requires_grad=True)
        both = cost(lambda: features(picture), backward=True)
    return RewardCost(found.parameters, found.weights, both, both.forward)
