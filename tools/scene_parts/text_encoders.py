"""The tokenizers and text encoders."""

import json
import string

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
)
from dmdr_train.problems import scenes
from small_models import (
    save,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from scene_parts.drawn_pictures import CAPTIONS, HOME

WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})
TEXT_LENGTH = 12


def clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer with one token for each of our words; other words are split into letters."""
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = list(string.ascii_lowercase)
    trainer = trainers.BpeTrainer(
        initial_alphabet=letters, end_of_word_suffix="</w>", min_frequency=1, show_progress=False
    )
    trained.train_from_iterator(WORDS + letters, trainer)
    bpe = json.loads(trained.to_str())["model"]
    # The trainer numbers the letters that end a word in another order each time.
    vocab = bpe["vocab"]
    ends = sorted(token for token in vocab if token.endswith("</w>") and len(token) == len("a</w>"))
    vocab |= dict(zip(ends, sorted(vocab[token] for token in ends), strict=True))
    vocab |= {name: len(vocab) + i for i, name in enumerate(["<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in bpe["merges"]], model_max_length=TEXT_LENGTH)


def t5_tokenizer() -> T5Tokenizer:
    words = [(f"▁{word}", -1.0) for word in WORDS]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def make_text() -> None:
    """Make three random, untrained text encoders, in which words and positions are far enough apart to distinguish."""
    torch.manual_seed(0)
    for suffix in ("", "_2"):
        clip = random_clip(CLIPTextModelWithProjection, width=32, layers=2, std=0.2)
        save(clip, HOME / f"teacher/text_encoder{suffix}")
        clip_tokenizer().save_pretrained(HOME / f"teacher/tokenizer{suffix}")
    pieces = t5_tokenizer()
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(pieces),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=pieces.pad_token_id,
            eos_token_id=pieces.eos_token_id,
        )
    )
    spread(t5, 0.2)
    nn.init.normal_(t5.get_input_embeddings().weight)
    # T5's only knowledge of positions; large enough that a word can recognise its neighbours.
    nn.init.normal_(t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, std=2.0)
    save(t5, HOME / "teacher/text_encoder_3")
    pieces.save_pretrained(HOME / "teacher/tokenizer_3")
    make_index()


def random_clip(
    kind: type[CLIPTextModel | CLIPTextModelWithProjection], width: int, layers: int, std: float
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return an untrained text encoder for `clip_tokenizer`."""
    words = clip_tokenizer()
    clip = kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    spread(clip, std)
    for part in clip.modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight)
    return clip.eval()


@torch.no_grad()
def look_back(clip: CLIPTextModel | CLIPTextModelWithProjection) -> None:
    """Make each word of an untrained text encoder know the words before it, such as a shape its colour.

    The first layer attends to the word before. The second looks two words back, less surely, since the first has mixed
    words and positions, which begin in subspaces of their own: so the query of a position finds the key of an earlier
    one, whatever the words are. Later layers stay as they are.
    """
    transformer = getattr(clip, "text_model", clip)  # transformers 5 has it in one of the two classes only
    positions = transformer.embeddings.position_embedding.weight
    words = transformer.embeddings.token_embedding.weight
    count, width = positions.shape
    basis = torch.linalg.qr(torch.randn(width, width)).Q.T
    place, meaning = basis[:count], basis[count:]
    # The lengths of positions and keys make the softmax sharp: the word before has 0.94 or more of the attention.
    positions.copy_(4 * place)
    words.copy_(torch.randn(len(words), len(meaning)) @ meaning)
    for offset, layer in enumerate(transformer.encoder.layers[:2], start=1):
        attention = layer.self_attn
        size = width // attention.num_heads
        earlier = place[(torch.arange(count) - offset).clamp(min=0)].T @ place
        for head in range(attention.num_heads):
            rows = slice(head * size, (head + 1) * size)
            key = 1.25 * torch.linalg.qr(torch.randn(size, count)).Q @ place
            attention.k_proj.weight[rows] = key
            attention.q_proj.weight[rows] = key @ earlier
        attention.q_proj.bias.zero_()
        attention.k_proj.bias.zero_()
        nn.init.normal_(attention.v_proj.weight, std=width**-0.5)
        nn.init.normal_(attention.out_proj.weight, std=width**-0.5)


def spread(model: nn.Module, std: float) -> None:
    """Draw all matrices again, larger than the libraries' initial values, so that words influence each other."""
    for weight in model.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=std)


def load_text() -> StableDiffusion3Pipeline:
    """Return the pipeline without its transformer and VAE; it turns captions into the teacher's conditions."""
    return StableDiffusion3Pipeline.from_pretrained(
        HOME / "teacher", transformer=None, vae=None, torch_dtype=torch.float32
    )


@torch.no_grad()
def conditions(captions: list[str]) -> tuple[Tensor, Tensor]:
    """Return text states `[N, 24, 64]` and pooled text `[N, 64]` of the captions, as in the stock pipeline."""
    text = load_text()
    parts = [captions[i : i + 500] for i in range(0, len(captions), 500)]
    encoded = [
        text.encode_prompt(part, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
        for part in parts
    ]
    return torch.cat([part[0] for part in encoded]), torch.cat([part[2] for part in encoded])


def make_index() -> None:
    """Write the files that complete the pipeline: scheduler, model_index.json, and the training prompts."""
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(HOME / "teacher/scheduler")
    names = {
        "scheduler": "diffusers FlowMatchEulerDiscreteScheduler",
        "text_encoder": "transformers CLIPTextModelWithProjection",
        "text_encoder_2": "transformers CLIPTextModelWithProjection",
        "text_encoder_3": "transformers T5EncoderModel",
        "tokenizer": "transformers CLIPTokenizer",
        "tokenizer_2": "transformers CLIPTokenizer",
        "tokenizer_3": "transformers T5Tokenizer",
        "transformer": "diffusers SD3Transformer2DModel",
        "vae": "diffusers AutoencoderKL",
    }
    index = {"_class_name": "StableDiffusion3Pipeline"} | {name: parts.split() for name, parts in names.items()}
    (HOME / "teacher/model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (HOME / "prompts.txt").write_text("\n".join(scenes.training_captions()) + "\n")
