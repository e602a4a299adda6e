import copy

import pytest
import torch
from dmdr_models import tiny
from dmdr_models.folder.lora_targets import check_targets, target_names
from dmdr_models.networks.lora import LoRANetwork, layer_names, start_values
from dmdr_models.sit.transformer import SiTTransformer
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def bare() -> SiTTransformer:
    return tiny.randomise(SiTTransformer(sample_size=4, width=16, depth=2, num_heads=2, num_classes=3), std=0.1)


def frozen() -> SiTTransformer:
    """As an adapter's network is. Torch may multiply with weights that are to be trained in another way."""
    return bare().requires_grad_(False)


def adapted(network: nn.Module, targets=("to_q", "to_v", "patch_embed"), b: float = 0.3) -> LoRANetwork:
    """With a B that is not zero, as after some training."""
    generator = torch.Generator().manual_seed(1)
    lora = LoRANetwork(network, rank=4, alpha=8, targets=targets, generator=generator)
    for layer in lora.layers:
        nn.init.normal_(layer.lora_B[lora.name].weight, std=b, generator=generator)
    return lora


@pytest.fixture
def inputs(noise):
    return torch.randn(3, 4, 4, 4, generator=noise), torch.rand(3, generator=noise), torch.tensor([0, 3, 1])


@pytest.mark.bits
def test_scale_0_is_the_bare_network_bit_for_bit(inputs):
    network = frozen()
    expected = network(*inputs)
    lora = adapted(network)
    assert torch.equal(lora(*inputs, lora_scale=0.0), expected)
    assert not torch.allclose(lora(*inputs, lora_scale=1.0), expected, atol=1e-3)


@pytest.mark.bits
def test_scale_0_does_not_compute_the_adapter(inputs):
    """Whatever it holds: 0 times something infinite is not 0."""
    lora = adapted(bare())
    expected = lora(*inputs, lora_scale=0.0)
    lora.layers[0].lora_B[lora.name].weight.data.fill_(torch.inf)
    assert torch.equal(lora(*inputs, lora_scale=0.0), expected)
    assert not lora(*inputs).isfinite().all()
    lora.layers[0].lora_B[lora.name].weight.data.zero_()
    assert not torch.equal(lora(*inputs), expected), "and the next call has it again"


class Operations(TorchDispatchMode):
    """Lists the operations that reach a device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapters", [1, 2])
@torch.no_grad()
def test_scale_0_costs_what_the_bare_network_costs(inputs, adapters):
    """The same operations, one for one: no product, no cast and no copy for an adapter, nor for another one's."""

    def cost(network, **named):
        with FlopCounterMode(display=False) as flops, Operations() as operations:
            network(*inputs, **named)
        return flops.get_total_flops(), operations.names

    network = frozen()
    expected = cost(network)
    targets = layer_names(network)
    for name in ("generator", "fake_score")[:adapters]:
        lora = LoRANetwork(network, rank=4, alpha=8, targets=targets, name=name)
    assert cost(lora, lora_scale=0.0) == expected
    flops, operations = cost(lora, lora_scale=2.0)
    assert flops > expected[0]
    assert len(operations) >= len(expected[1]) + 3 * len(lora.layers), "two products and a sum for every layer"


@pytest.mark.bits
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scale_0_gives_gradients_to_its_inputs_alone(inputs, checkpointing):
    """Also where activations are recomputed after the network was called at another scale."""
    x, *others = inputs

    def gradient(network, **named):
        leaf = x.clone().requires_grad_()
        output = network(leaf, *others, **named)
        if named:
            with torch.no_grad():
                network(leaf, *others, lora_scale=2.0)
        output.square().mean().backward()
        return leaf.grad

    network = frozen()
    if checkpointing:
        network.enable_gradient_checkpointing()
    expected = gradient(network)
    lora = adapted(network)
    assert torch.equal(gradient(lora, lora_scale=0.0), expected)
    assert all(parameter.grad is None for parameter in lora.parameters())
    assert not lora(*inputs, lora_scale=0.0).requires_grad


@pytest.mark.bits
@pytest.mark.parametrize("rank", [1, 4])
def test_a_new_adapter_has_no_effect(inputs, rank):
    network = frozen()
    expected = network(*inputs)
    lora = LoRANetwork(network, rank=rank, alpha=4, targets=["to_q"])
    assert torch.equal(lora(*inputs), expected)


@pytest.mark.bits
def test_scale_2_is_doubling_b(inputs):
    lora = adapted(bare())
    assert torch.equal(lora(*inputs), lora(*inputs, lora_scale=1.0)), "the strength that it is trained at"
    twice = lora(*inputs, lora_scale=2.0)
    for layer in lora.layers:
        layer.lora_B[lora.name].weight.data.mul_(2)
    assert torch.equal(lora(*inputs, lora_scale=1.0), twice)


def test_strength_is_alpha_over_rank_times_b_a():
    linear = nn.Sequential()
    linear.add_module("layer", nn.Linear(5, 3))
    weight, bias = linear.layer.weight.clone(), linear.layer.bias.clone()
    lora = adapted(linear, targets=["layer"])
    a, b = lora.layers[0].lora_A[lora.name].weight, lora.layers[0].lora_B[lora.name].weight
    assert (a.shape, b.shape) == ((4, 5), (3, 4))
    x = torch.randn(2, 5)
    expected = x @ (weight + 0.5 * (8 / 4) * b @ a).T + bias
    torch.testing.assert_close(lora(x, lora_scale=0.5), expected)


def test_only_the_adapter_is_trained(inputs):
    lora = adapted(bare())
    trainable = {name for name, parameter in lora.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in lora.named_parameters() if "lora_" in name}
    assert len(trainable) == 2 * len(lora.layers) == 2 * (2 * 2 + 1)
    assert len(list(lora.parameters())) == len(trainable) + len(list(bare().parameters())), (
        "the frozen ones are its own"
    )
    lora(*inputs).square().mean().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in lora.parameters())


def test_start_values_come_from_the_generator():
    def start(seed):
        lora = LoRANetwork(bare(), 4, 4, ["to_q", "patch_embed"], generator=torch.Generator().manual_seed(seed))
        return [layer.lora_A[lora.name].weight for layer in lora.layers]

    first, again, other = start(0), start(0), start(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for a in first:
        bound = a[0].numel() ** -0.5
        assert 0.8 * bound < a.abs().max() <= bound


def test_gaussian_start_values_are_those_of_peft():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(300, 5), nn.Conv2d(50, 5, 3))
    lora = LoRANetwork(network, 8, 8, ["0", "1"], torch.Generator().manual_seed(3), init="gaussian")
    expected = get_peft_model(
        nn.Sequential(nn.Linear(300, 5), nn.Conv2d(50, 5, 3)),
        LoraConfig(r=8, lora_alpha=8, target_modules=["0", "1"], init_lora_weights="gaussian"),
    )
    theirs = [module.lora_A["default"].weight for module in expected.modules() if isinstance(module, LoraLayer)]
    for a, peft in zip([layer.lora_A[lora.name].weight for layer in lora.layers], theirs, strict=True):
        assert a.shape == peft.shape
        assert a.std().item() == pytest.approx(1 / 8, rel=0.1)
        assert peft.std().item() == pytest.approx(1 / 8, rel=0.1)
        assert a.mean().abs() < 0.02


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_output_gaussian_is_a_lora_on_the_output_of_the_layer(noise, kind):
    """The authors' form, q + s·(q·Z)·B without a bias, written out: the same outputs, and the same gradient in B."""
    layer: nn.Module = nn.Linear(7, 5, bias=False) if kind == "linear" else nn.Conv2d(3, 5, 3, bias=False)
    x = torch.randn(4, 7, generator=noise) if kind == "linear" else torch.randn(4, 3, 6, 6, generator=noise)
    q = layer(x).detach().movedim(1, -1)  # channels last
    lora = LoRANetwork(nn.Sequential(layer), 3, 6, ["0"], torch.Generator().manual_seed(9), init="output_gaussian")
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(9))
    ours = lora.layers[0].lora_B[lora.name].weight
    theirs = torch.zeros(3, 5, requires_grad=True)  # [rank, width], as in the authors' code
    wanted = torch.randn(q.shape, generator=noise)
    for b in (torch.zeros(3, 5), torch.randn(3, 5, generator=noise)):  # at the start, and later
        with torch.no_grad():
            theirs.copy_(b)
            ours.copy_(b.T.reshape(ours.shape))
        found = lora(x, lora_scale=0.7).movedim(1, -1)
        expected = q + 0.7 * (6 / 3) * (q @ z) @ theirs
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        (found - wanted).square().sum().backward()
        (expected - wanted).square().sum().backward()
        torch.testing.assert_close(ours.grad.flatten(1).T, theirs.grad, rtol=1e-4, atol=1e-4)
        assert theirs.grad.abs().max() > 1
        ours.grad = theirs.grad = None


@pytest.mark.parametrize(
    "weight", [torch.randn(4, 2, 3, 3), torch.zeros(4, 4, 3, 3, dtype=torch.uint8)], ids=["groups", "quantised"]
)
def test_output_gaussian_needs_the_weights_of_a_plain_layer(weight):
    with pytest.raises(ValueError, match="groups or quantised weights, which init output_gaussian cannot use"):
        start_values("output_gaussian", torch.empty(2, 4, 3, 3), weight)


def test_start_values_hardly_depend_on_the_precision_of_the_layer():
    """Z is drawn in float32 on the CPU, whatever the precision of the layer."""
    layer = nn.Linear(6, 4)
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    exact = LoRANetwork(nn.Sequential(copy.deepcopy(layer)), 2, 2, ["0"], draws[0], init="output_gaussian")
    coarse = LoRANetwork(nn.Sequential(layer.bfloat16()), 2, 2, ["0"], draws[1], init="output_gaussian")
    a, b = (lora.layers[0].lora_A[lora.name].weight.float() for lora in (exact, coarse))
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_targets_that_match_nothing():
    network = bare()
    layers = layer_names(network)
    assert {"to_q", "to_k", "to_v", "to_out", "fc1", "fc2", "modulation", "proj_out"} < set(target_names(layers))
    assert not {"blocks", "attn"} & set(target_names(layers)), "what holds layers is none"
    check_targets(["to_q", "blocks.1.attn.to_v"], layers)
    with pytest.raises(ValueError, match="'to_p' matches no layer of the network; did you mean to_"):
        check_targets(["to_q", "to_p"], layers)
    with pytest.raises(ValueError, match="'q'"):
        check_targets(["q"], layers)  # a part of a name is not a name
    with pytest.raises(ValueError, match=r"valid are .*to_q"):
        LoRANetwork(network, 4, 4, ["xyz"])
    assert all(parameter.requires_grad for parameter in network.parameters()), "a refused network is not touched"


@pytest.mark.parametrize("last", [0.25, 0.0])
def test_merged_is_scale_1(inputs, tmp_path, last):
    lora = adapted(bare())
    expected = lora(*inputs, lora_scale=1.0)
    lora(*inputs, lora_scale=last)
    merged = lora.merged()
    torch.testing.assert_close(merged(*inputs), expected, atol=1e-5, rtol=1e-5)
    assert merged.state_dict().keys() == bare().state_dict().keys()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(SiTTransformer.from_pretrained(tmp_path)(*inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_belong_to_the_scale_of_their_own_call(inputs, checkpointing):
    """Recomputed activations must see the scale of the call, whatever was called since."""

    def gradients(*scales, together):
        network = bare()
        if checkpointing:
            network.enable_gradient_checkpointing()
        lora = adapted(network)
        losses = []
        for scale in scales:
            losses.append(lora(*inputs, lora_scale=scale).square().mean())
            if not together:
                losses.pop().backward()
        with torch.no_grad():
            lora(*inputs, lora_scale=7.0)
        if together:
            sum(losses).backward()
        return torch.cat([p.grad.flatten() for p in lora.parameters() if p.requires_grad])

    one, other = gradients(2.0, together=False), gradients(0.5, together=False)
    assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(gradients(2.0, 0.5, together=True), one + other)
    torch.testing.assert_close(gradients(0.5, 2.0, together=True), one + other)


def test_checkpointing_changes_no_gradient(inputs):
    def gradient(checkpointing):
        network = bare()
        if checkpointing:
            network.enable_gradient_checkpointing()
        lora = adapted(network)
        lora(*inputs, lora_scale=0.75).square().mean().backward()
        return [p.grad for p in lora.parameters() if p.requires_grad]

    for a, b in zip(gradient(False), gradient(True), strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_may_have_names(inputs):
    lora = adapted(bare())
    x, t, labels = inputs
    assert torch.equal(lora(x, t, class_labels=labels, lora_scale=0.5), lora(*inputs, lora_scale=0.5))


def test_the_adapter_is_saved_under_the_names_of_peft():
    state = adapted(bare(), targets=["blocks.1.attn.to_q"]).adapter_state()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "blocks.1.attn.to_q.lora_A.weight": (4, 16),
        "blocks.1.attn.to_q.lora_B.weight": (16, 4),
    }
    assert not any(tensor.requires_grad for tensor in state.values())


def test_config_is_the_networks():
    assert adapted(bare()).config.width == 16


def two_on_one(network: nn.Module) -> tuple[LoRANetwork, LoRANetwork]:
    """Two adapters over one network, with some layers in common and some not."""
    draws = torch.Generator().manual_seed(2)
    generator = LoRANetwork(network, 4, 8, ["to_q", "to_v"], draws, name="generator", shared=True)
    fake = LoRANetwork(network, 2, 2, ["to_q", "to_k"], draws, name="fake", shared=True)
    for lora in (generator, fake):
        for layer in lora.layers:
            nn.init.normal_(layer.lora_B[lora.name].weight, std=0.3, generator=draws)
    return generator, fake


@pytest.mark.bits
def test_two_adapters_on_one_network_are_those_on_two(inputs):
    shared = two_on_one(bare())
    alone = (LoRANetwork(bare(), 4, 8, ["to_q", "to_v"]), LoRANetwork(bare(), 2, 2, ["to_q", "to_k"]))
    for one, other in zip(shared, alone, strict=True):
        state = one.adapter_state()
        assert state.keys() == other.adapter_state().keys()
        for name, parameter in other.adapter_state().items():
            parameter.copy_(state[name])
    for scale in (0.0, 1.0, 2.0):
        for one, other in zip(shared, alone, strict=True):
            assert torch.equal(one(*inputs, lora_scale=scale), other(*inputs, lora_scale=scale))


def test_an_adapter_on_a_shared_network_owns_its_parameters_alone(inputs):
    network = bare()
    generator, fake = two_on_one(network)
    names = [dict(lora.named_parameters()).keys() for lora in (generator, fake)]
    assert names[0] == {n for n, p in LoRANetwork(bare(), 4, 8, ["to_q", "to_v"], name="generator").named_parameters()
                        if p.requires_grad}  # fmt: skip
    assert not names[0] & names[1]
    assert {id(p) for lora in (generator, fake) for p in lora.parameters()} == {
        id(p) for p in network.parameters() if p.requires_grad
    }


def test_gradient_reaches_the_adapter_of_the_call_alone(inputs):
    network = bare()
    network.enable_gradient_checkpointing()
    generator, fake = two_on_one(network)
    reference = two_on_one(bare())[0]
    reference(*inputs, lora_scale=0.5).square().mean().backward()
    output = generator(*inputs, lora_scale=0.5)
    fake(*inputs, lora_scale=2.0)
    output.square().mean().backward()
    assert all(parameter.grad is None for parameter in fake.parameters())
    for ours, expected in zip(generator.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
