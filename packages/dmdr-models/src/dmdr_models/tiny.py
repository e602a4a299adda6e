"""Small random-weight models of every family, for tests, demos and trying a recipe: no download, no GPU.

path = dmdr_models.tiny.sit("somewhere")     # a folder that dmdr_models.load("sit", path) opens
path = dmdr_models.tiny.sd3("elsewhere")     # a stock StableDiffusion3Pipeline opens this one, too
path = dmdr_models.tiny.sdxl("third")        # a stock StableDiffusionXLPipeline opens this one
path = dmdr_models.tiny.taesd("decoder")     # an AutoencoderTiny, for SDXL's `vae=`
path = dmdr_models.tiny.classifier("judge")  # a transformers classifier, for the reward class-label and for evaluation
"""

import json
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

CLIP_WIDTH = 16


def randomise(network: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    """Fill every parameter with noise, so that every layer has an effect (adaLN-zero starts with a zero output)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=std, generator=generator)
    return network


def sit(
    path: str | Path,
    *,
    sample_size: int = 4,
    width: int = 32,
    depth: int = 2,
    num_heads: int = 2,
    num_classes: int = 10,
    qk_norm: bool = False,
    seed: int = 0,
) -> Path:
    """Write a SiT with its VAE to `path`, and return `path`.

    The pictures are `8 · sample_size` pixels wide, as with the full model's VAE.
    """
    from dmdr_models.sit.transformer import SiTTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer: Any = SiTTransformer(
            sample_size=sample_size,
            patch_size=2,
            width=width,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            qk_norm=qk_norm,
        )
        vae = _vae(latent_channels=4)
    randomise(transformer, seed)
    transformer.save_pretrained(Path(path) / "transformer")
    vae.save_pretrained(Path(path) / "vae")
    return Path(path)


def sd3(
    path: str | Path,
    *,
    sample_size: int = 4,
    width: int = 32,
    depth: int = 2,
    num_heads: int = 2,
    dual_attention_layers: Sequence[int] = (),
    qk_norm: str | None = None,
    max_size: int = 8,
    shift: float = 3.0,
    seed: int = 0,
) -> Path:
    """Write a Stable Diffusion 3 with all its parts to `path`, and return `path`.

    The pictures are `8 · sample_size` pixels wide unless asked otherwise, at most `16 · max_size`. The tokenizers know
    single characters: the CLIP ones every byte, the T5 one printable ASCII.

    Args:
        dual_attention_layers, qk_norm: SD3.5-Large has the norm "rms_norm", SD3.5-Medium also second attentions.
        shift: of the scheduler.
    """
    import transformers
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    t5_width = 48  # more than twice CLIP's: like the real ones, the joint CLIP features are padded to T5's width
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        tokenizers = [_clip_tokenizer(Path(folder) / "1", pad="<|endoftext|>"), _clip_tokenizer(Path(folder) / "2")]
        transformer: Any = SD3Transformer2DModel(
            sample_size=sample_size,
            num_layers=depth,
            attention_head_dim=width // num_heads,
            num_attention_heads=num_heads,
            joint_attention_dim=t5_width,
            caption_projection_dim=width,
            pooled_projection_dim=2 * CLIP_WIDTH,
            pos_embed_max_size=max_size,
            dual_attention_layers=tuple(dual_attention_layers),
            qk_norm=qk_norm,
        )
        randomise(transformer, seed, std=0.15)
        parts: dict[str, Any] = {"transformer": transformer, "tokenizer_3": _t5_tokenizer(Path(folder) / "3")}
        for suffix, tokenizer in zip(("", "_2"), tokenizers, strict=True):
            parts[f"tokenizer{suffix}"] = tokenizer
            parts[f"text_encoder{suffix}"] = transformers.CLIPTextModelWithProjection(_clip_config(tokenizer))
        parts["text_encoder_3"] = transformers.T5EncoderModel(_t5_config(parts["tokenizer_3"], t5_width))
        parts["vae"] = _vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, quant=False)
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=shift)
        pipeline: Any = StableDiffusion3Pipeline(**parts)
        pipeline.save_pretrained(path)
    return Path(path)


def sdxl(
    path: str | Path,
    *,
    sample_size: int = 4,
    width: int = 16,
    transformer_layers: Sequence[int] = (1, 1),
    force_zeros_for_empty_prompt: bool = True,
    seed: int = 0,
) -> Path:
    """Write an SDXL with all its parts to `path`, and return `path`.

    The pictures are `8 · sample_size` pixels wide unless asked otherwise. The UNet has layers of every kind of the full
    one's, the noise of its scheduler is the full one's, and the tokenizers know single bytes.

    Args:
        width: channels at the first of the UNet's two levels, a multiple of 16; the second has twice as many.
        transformer_layers: of each attention at each level.
        force_zeros_for_empty_prompt: the empty prompt's embeddings are zeros, as in the full model.
    """
    import transformers
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    time_width = 8
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        tokenizers = [_clip_tokenizer(Path(folder) / "1", pad="<|endoftext|>"), _clip_tokenizer(Path(folder) / "2")]
        unet: Any = UNet2DConditionModel(
            sample_size=sample_size,
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=list(transformer_layers),
            attention_head_dim=[2, 4],  # heads, by a slip of the library's that all published configs follow
            use_linear_projection=True,
            cross_attention_dim=2 * CLIP_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=CLIP_WIDTH + 6 * time_width,
        )
        first, second = map(_clip_config, tokenizers)
        schedule: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        schedule |= {"timestep_spacing": "leading", "steps_offset": 1}
        pipeline: Any = StableDiffusionXLPipeline(
            vae=_vae(latent_channels=4, scaling_factor=0.13025),
            text_encoder=transformers.CLIPTextModel(first),
            text_encoder_2=transformers.CLIPTextModelWithProjection(second),
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=unet,
            scheduler=EulerDiscreteScheduler(**schedule),
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=False,
        )
        pipeline.save_pretrained(path)
    return Path(path)


def taesd(path: str | Path, *, latent_channels: int = 4, seed: int = 0) -> Path:
    """Write an AutoencoderTiny in TAESD's layout to `path`, and return `path`; it replaces a model's VAE."""
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae: Any = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
            latent_channels=latent_channels,
        )
    vae.save_pretrained(path)
    return Path(path)


def classifier(path: str | Path, *, labels: int = 10, seed: int = 5) -> Path:
    """Write a transformers image classifier with its preprocessor to `path`, and return `path`.

    It takes 16 x 16 pixels. Its weights are so large that its scores differ from picture to picture.
    """
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48}
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": labels}
    config = ViTConfig(**sizes, **layers)
    with torch.random.fork_rng(devices=[]):
        network: Any = ViTForImageClassification(config)
    randomise(network, seed, std=0.3)
    network.save_pretrained(path)
    preprocessor = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (Path(path) / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return Path(path)


def _vae(latent_channels: int, quant: bool = True, **config: Any) -> Any:
    """A VAE that makes eight pixels of one latent, like the full ones."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **config,
    )


def _clip_tokenizer(folder: Path, pad: str = "!") -> Any:
    """CLIP's tokenizer with no merges: each byte is a token, and another one at the end of a word."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad, model_max_length=77)


def _clip_config(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _t5_config(tokenizer: Any, width: int) -> Any:
    from transformers import T5Config

    sizes: dict[str, Any] = {"d_model": width, "d_kv": 8, "d_ff": width, "num_layers": 1, "num_heads": 2}
    return T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes)


def _t5_tokenizer(folder: Path) -> Any:
    """T5's tokenizer with a token for every printable ASCII character."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]

    characters = "▁" + string.ascii_letters + string.digits + string.punctuation
    specials = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram([*((one, 0.0) for one in specials), *((one, -4.0) for one in characters)], 2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=512)
