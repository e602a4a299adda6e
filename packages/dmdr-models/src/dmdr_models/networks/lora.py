"""LoRA through peft, with a strength that is chosen at every call.

One frozen network with one adapter plays two roles: at scale s_f it is the fake score, at scale s_r the teacher. Scale
0 leaves the adapter out, which gives the frozen network bit for bit; scale 2 is the same as doubling B. If the
generator is a LoRA too, its adapter can live on the same frozen network.
"""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dmdr_models.folder.lora_targets import check_targets
from dmdr_models.networks.lora_files import LoRA

Init = Literal["kaiming", "gaussian", "output_gaussian"]


def layer_names(network: nn.Module) -> list[str]:
    """The names of all linear and convolution layers of a network; a layer that carries adapters counts once."""
    adapted = tuple(f"{name}." for name, module in network.named_modules() if isinstance(module, LoraLayer))
    kinds = (nn.Linear, nn.Conv2d, LoraLayer)
    found = [name for name, module in network.named_modules() if isinstance(module, kinds)]
    return [name for name in found if not name.startswith(adapted)]


class LoRANetwork(nn.Module):
    """A frozen network with a trainable LoRA of a given strength.

    Calling it as `network(*inputs, lora_scale=s, **inputs)` runs the network with the adapter's contribution
    (alpha / rank) · B·A multiplied by `s`, and without other adapters on the same network. At scale 0 the adapter is
    not computed: the call costs what the frozen network costs, and gives the adapter no gradient. A backward pass that
    recomputes activations (gradient checkpointing) uses the adapter and the scale of its own forward pass, also if the
    network was called with others in between.

    Args:
        network: any module; all of its parameters except those of earlier adapters are frozen, and its layers are
            changed in place.
        rank, alpha: of the adapter; B starts at zero, so that the adapter starts without effect.
        targets: names, or last parts of names, of the linear and convolution layers to adapt.
        generator: draws the start values of A; a generator of the CPU, whatever device the network is on.
        init: the distribution of A's start values, see `start_values`.
        name: of the adapter.
        shared: `network` carries other adapters as well. This module then registers only the parameters of its own
            adapter, under the same names, so that an engine made of it moves, casts and trains nothing else.

    Raises:
        ValueError: a target matches no layer, or a layer does not go with `init`.
    """

    def __init__(
        self,
        network: nn.Module,
        rank: int,
        alpha: float,
        targets: Sequence[str],
        generator: torch.Generator | None = None,
        name: str = "lora",
        shared: bool = False,
        init: Init = "kaiming",
    ):
        super().__init__()
        check_targets(targets, layer_names(network))
        self.name, self.rank, self.alpha, self.targets = name, rank, alpha, tuple(targets)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights=True)  # type: ignore[arg-type]
        trained = [p for n, p in network.named_parameters() if ".lora_" in n]
        network.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is no accident
            warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # quantised weights are not merged
            base = inject_adapter_in_model(config, network, adapter_name=name)
        self._base = (base,)  # in a tuple, torch does not register it
        self._layers = {
            at: layer for at, layer in base.named_modules() if isinstance(layer, LoraLayer) and name in layer.lora_A
        }
        self.layers = list(self._layers.values())
        self._seen: tuple[int, list[LoraLayer]] = 0, []
        for layer in self.layers:
            a: Any = layer.lora_A[name].weight
            frozen: Any = layer.get_base_layer()
            # peft would draw from the global generator.
            a.data.copy_(start_values(init, a, frozen.weight, generator))
        for parameter in (*trained, *self._adapter_parameters().values()):
            parameter.requires_grad_(True)
        self.network: nn.Module = nn.Module() if shared else base
        if shared:
            for at, parameter in self._adapter_parameters().items():
                register(self.network, at, parameter)

    @property
    def base(self) -> nn.Module:
        """The network that carries the adapter."""
        return self._base[0]

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def factors(self) -> dict[str, tuple[str, str]]:
        """The names of A and B among this module's parameters, by the names of the layers that they adapt."""
        return {
            at: (f"network.{at}.lora_A.{self.name}.weight", f"network.{at}.lora_B.{self.name}.weight")
            for at in self._layers
        }

    def frozen_weight(self, layer: str) -> nn.Parameter:
        """The weights under the adapter of a layer."""
        weight: Any = self._layers[layer].get_base_layer().weight
        return weight

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's weights by the names that PEFT saves them under, such as `blocks.0.to_q.lora_A.weight`."""
        return {at.replace(f".{self.name}.", "."): p.detach() for at, p in self._adapter_parameters().items()}

    def start_from(self, lora: LoRA) -> None:
        """Take over the weights of a LoRA with the same layers and rank; B makes up for another alpha.

        Raises:
            ValueError: it has other layers, another rank, or does not fit them.
        """
        for name in sorted(lora.changes.keys() ^ self._layers.keys()):
            raise ValueError(f"{lora.source} adapts other layers, for example as to {name}: set targets to its own")
        for name, layer in self._layers.items():
            a, b, scale = lora.changes[name]
            own: Any = layer.lora_A[self.name].weight, layer.lora_B[self.name].weight
            for found, weight in zip((a, b), own, strict=True):
                if found.shape != weight.shape:
                    shapes = f"{tuple(found.shape)}, not {tuple(weight.shape)}"
                    raise ValueError(
                        f"{lora.source} adapts {name} with a matrix of shape {shapes}: set rank to its own"
                    )
            own[0].data.copy_(a)
            own[1].data.copy_(b * (scale * self.rank / self.alpha))

    def _adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{at}.{part}.{self.name}.weight": getattr(layer, part)[self.name].weight
            for at, layer in self._layers.items()
            for part in ("lora_A", "lora_B")
        }

    def set_scale(self, scale: float) -> None:
        """Switch the network to this adapter, at this scale; at 0, to none.

        The scale is a tensor on the CPU: torch multiplies by it as by a number, and a compiled block takes it as an
        input. It is a new tensor each time, since backward passes of earlier calls need the old one.
        """
        active = [self.name] if scale else []
        for layer in self._adapted_by_anyone():
            # peft's set_adapter would also change which parameters require a gradient.
            layer._active_adapter = active
        if scale:
            factor = torch.tensor(scale * self.alpha / self.rank, dtype=torch.float64, device="cpu")
            for layer in self.layers:
                layer.scaling[self.name] = factor

    def _adapted_by_anyone(self) -> list[LoraLayer]:
        adapters = len(self.base.peft_config)  # type: ignore[arg-type]
        if self._seen[0] != adapters:
            self._seen = adapters, [layer for layer in self.base.modules() if isinstance(layer, LoraLayer)]
        return self._seen[1]

    def forward(self, *inputs: Any, lora_scale: float = 1.0, **named: Any) -> Any:
        self.set_scale(lora_scale)
        output = self.base(*inputs, **named)
        first = output if isinstance(output, Tensor) else output[0]
        if isinstance(first, Tensor) and first.requires_grad:
            # Runs first of all in the backward pass of this very call.
            first.register_hook(lambda _: self.set_scale(lora_scale))
        return output

    def merged(self) -> nn.Module:
        """The network with the adapter at scale 1 folded into its weights; this object is used up."""
        self.set_scale(1.0)
        for at, layer in self._layers.items():
            layer.merge(adapter_names=[self.name])
            parent, _, child = at.rpartition(".")
            setattr(self.base.get_submodule(parent), child, layer.get_base_layer())
        return self.base


def start_values(init: Init, a: Tensor, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Start values of A, on the CPU, with A's shape: `[rank, fan_in]`, or `[rank, C, H, W]` for a convolution.

    B starts at zero, so the first updates of Adam in B, which do not depend on the size of its gradient, change the
    network in proportion to |A|. A learning rate is therefore meant for one distribution of A.

    | init | A |
    |---|---|
    | `kaiming` | U(−1/√fan_in, 1/√fan_in), the default of peft |
    | `gaussian` | N(0, 1/rank²), peft's "gaussian"; the DMDR authors' choice for SD3 and SDXL |
    | `output_gaussian` | Zᵀ·W with Z ~ N(0, 1), `[fan_out, rank]`; the DMDR authors' choice for SiT |

    The authors' SiT has its LoRA on the output of a projection, q + s·(q·Z)·B with q = W·x + bias. Apart from the
    bias, A = Zᵀ·W starts the same network, with the same gradient in B.

    Args:
        weight: W, of the frozen layer, `[fan_out, fan_in]` or `[fan_out, C, H, W]`.

    Raises:
        ValueError: `output_gaussian`, and the layer has groups or quantised weights.
    """
    start = torch.empty(a.shape, dtype=a.dtype)  # on the CPU, as its generator
    if init == "kaiming":
        bound = a[0].numel() ** -0.5
        return start.uniform_(-bound, bound, generator=generator)
    if init == "gaussian":
        return start.normal_(0, 1 / len(a), generator=generator)
    plain = weight.is_floating_point() and type(weight.data) is Tensor  # torchao's tensors say that they are floats
    if weight.shape[1:] != a.shape[1:] or not plain:
        raise ValueError("a layer has groups or quantised weights, which init output_gaussian cannot use; use gaussian")
    z = torch.randn(len(weight), len(a), generator=generator)
    return (z.T @ weight.detach().cpu().float().flatten(1)).view(a.shape)


def register(module: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted path, in new empty modules where there are none."""
    *parents, leaf = path.split(".")
    for part in parents:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    module.register_parameter(leaf, parameter)
