"""Compiled and checkpointed blocks: they compute what the plain ones do, with how many graphs, calls and bytes."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from dmdr_models import tiny
from dmdr_models.networks.checkpointed import EveryNth, checkpoint_blocks
from dmdr_models.networks.compiled import compile_blocks
from dmdr_models.networks.lora import LoRANetwork
from dmdr_models.sit.transformer import SiTTransformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with torch._dynamo.config.patch(recompile_limit=8):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()


def sit() -> SiTTransformer:
    return SiTTransformer(sample_size=4, width=16, depth=3, num_heads=2, num_classes=3)


def sit_inputs(rows: int) -> tuple[Tensor, ...]:
    noise = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 4, 4, 4, generator=noise), torch.rand(rows, generator=noise), torch.arange(rows) % 4


def sd3() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
    )


def sd3_inputs(rows: int, size: int) -> tuple[Tensor, ...]:
    noise = torch.Generator().manual_seed(rows)
    texts = torch.randn(rows, 3, 8, generator=noise), torch.randn(rows, 8, generator=noise)
    return torch.randn(rows, 4, size, 4, generator=noise), *texts, torch.rand(rows, generator=noise)


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=8,
    )


def unet_inputs(rows: int, size: int) -> tuple[Tensor, ...]:
    noise = torch.Generator().manual_seed(rows)
    latents = torch.randn(rows, 4, size, 12, generator=noise)
    return latents, torch.rand(rows, generator=noise), torch.randn(rows, 3, 8, generator=noise)


def adapted(network: Any, targets: tuple[str, ...], names: tuple[str, ...]) -> list[LoRANetwork]:
    """Adapters with an effect on a network with gradient checkpointing of every second block."""
    tiny.randomise(network, std=0.1)
    checkpoint_blocks(network, 2)
    noise = torch.Generator().manual_seed(1)
    loras = [LoRANetwork(network, 4, 8, targets, noise, name).eval() for name in names]
    for lora in loras:
        for layer in lora.layers:
            nn.init.normal_(layer.lora_B[lora.name].weight, std=0.3, generator=noise)
    return loras


def compiled(network: nn.Module) -> CompileCounterWithBackend:
    counter = CompileCounterWithBackend("eager")
    compile_blocks(network, counter)
    return counter


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def computed(loras: list[LoRANetwork], inputs: tuple[Tensor, ...], scale: float) -> list[Tensor]:
    """The outputs of all adapters and of none, and the gradients of all weights.

    The backward passes come after all calls, and so recompute activations of another adapter and scale.
    """
    outputs = [first(lora(*inputs, lora_scale=scale)) for lora in loras]
    with torch.no_grad():
        bare = first(loras[0](*inputs, lora_scale=0.0))
    loras[0].zero_grad()
    for output in outputs:
        output.square().sum().backward()
    grads = [p.grad for lora in loras for n, p in lora.named_parameters() if f".{lora.name}." in n]
    return [bare, *outputs, *(g for g in grads if g is not None)]


@pytest.mark.bits
def test_no_scale_and_no_number_of_rows_takes_a_graph_of_its_own() -> None:
    """Two adapters on one network, and none: three graphs for several rows, and three for one row."""
    targets, names = ("patch_embed", "to_q", "fc1"), ("generator", "fake_score")
    bare = tiny.randomise(sit(), std=0.1).requires_grad_(False).eval()
    plain, network = adapted(sit(), targets, names), sit()
    fast = adapted(network, targets, names)
    state, counter = sorted(network.state_dict()), compiled(network)
    graphs = []
    for rows, scale in ((2, 0.5), (3, 0.4983), (2, 2.0), (1, 0.5), (1, 0.4983), (5, 1.0), (1, 1.0)):
        inputs = sit_inputs(rows)
        expected, found = computed(plain, inputs, scale), computed(fast, inputs, scale)
        assert len(found) == 1 + 2 + 2 * 2 * len(fast[0].layers)
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        assert torch.equal(found[0], bare(*inputs)), "scale 0 is the bare network"
        graphs.append(counter.frame_count)
    assert graphs == [3, 3, 3, 6, 6, 6, 6]
    assert sorted(network.state_dict()) == state, "names stay as they are"


def with_gradients(lora: LoRANetwork, inputs: tuple[Tensor, ...], scale: float) -> list[Tensor]:
    output = first(lora(*inputs, lora_scale=scale))
    return [output, *torch.autograd.grad(output.square().sum(), [p for p in lora.parameters() if p.requires_grad])]


@pytest.mark.bits
@pytest.mark.parametrize(
    ("make", "make_inputs", "targets", "structures"),
    [(sd3, sd3_inputs, ("pos_embed.proj", "context_embedder", "to_q"), 2), (unet, unet_inputs, ("conv_in", "to_q"), 1)],
    ids=["sd3", "sdxl"],
)
def test_no_size_takes_a_graph_of_its_own(make: Any, make_inputs: Any, targets: Any, structures: int) -> None:
    """One graph for the blocks of each structure; SD3's last block is another one.

    Torch takes sizes that are equal in the first call, such as those of tokens and channels, for one and the same.
    """
    (plain,), network = adapted(make(), targets, ("lora",)), make()
    (fast,) = adapted(network, targets, ("lora",))
    counter = compiled(network)
    graphs = []
    for size, rows in ((8, 2), (16, 2), (8, 3)):
        expected, found = (with_gradients(lora, make_inputs(rows, size), size / 10) for lora in (plain, fast))
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        graphs.append(counter.frame_count)
    assert graphs == [structures] * 3


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear names no repeated blocks, which could be compiled; use false"):
        compile_blocks(nn.Linear(2, 2))


# -- gradient checkpointing

NETWORKS = {
    "sit": (sit, lambda: sit_inputs(2)),
    "sd3": (sd3, lambda: sd3_inputs(2, 8)),
    "sdxl": (unet, lambda: unet_inputs(2, 8)),
}


def gradients(network: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The output and the gradients of all weights that have one."""
    output = network(*inputs)
    output = output if isinstance(output, Tensor) else output[0]
    output.square().sum().backward()
    return [output, *(p.grad for p in network.parameters() if p.grad is not None)]


def calls(network: nn.Module) -> Counter[nn.Module]:
    """Count the calls of every module from now on."""
    count: Counter[nn.Module] = Counter()
    for module in network.modules():
        module.register_forward_pre_hook(lambda module, _: count.update([module]))
    return count


@pytest.mark.bits
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_gradient_changes(name: str, every: int) -> None:
    make, inputs = NETWORKS[name]
    found = []
    for checkpointed in (False, True):
        network: Any = tiny.randomise(make(), std=0.1).eval()
        if checkpointed:
            checkpoint_blocks(network, every)
        found.append(gradients(network, inputs()))
    assert len(found[0]) > 10
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("every", "twice"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0]), (4, [0])])
def test_every_nth_block_is_called_again(every: int, twice: list[int]) -> None:
    network = sit().train()
    checkpoint_blocks(network, every)
    counted = calls(network)
    for again in (1, 2):
        gradients(network, sit_inputs(2))
        assert [counted[block] for block in network.blocks] == [again * (1 + (i in twice)) for i in range(3)]


def test_the_blocks_of_a_unet_take_turns() -> None:
    """Transformer blocks and residual blocks in one order, that of the forward pass."""
    network: Any = unet()
    counted = calls(network)
    order: list[nn.Module] = []
    checkpoint_blocks(network, 2)
    every = network.mid_block._gradient_checkpointing_func
    assert isinstance(every, EveryNth)
    gradients(network, unet_inputs(2, 8))
    order = list(every._numbers)
    assert [counted[block] for block in order] == [2 if i % 2 == 0 else 1 for i in range(len(order))]
    assert {type(block).__name__ for block in order} == {"ResnetBlock2D", "BasicTransformerBlock"}


def held(make: Callable[[], Any], every: int) -> int:
    """The bytes that wait for the backward pass."""
    network, found = make(), {}
    if every:
        checkpoint_blocks(network, every)

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*sit_inputs(2))
    return sum(found.values())


def test_fewer_bytes_wait_for_the_backward_pass() -> None:
    none, half, all_of_them = (held(sit, every) for every in (0, 2, 1))
    assert none > half > all_of_them


def test_a_network_without_checkpointing_is_refused() -> None:
    network = sit()
    network._supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="SiTTransformer does not support gradient checkpointing"):
        checkpoint_blocks(network)
