"""The loss of distribution matching, forward and backward: ours, its formula in plain autograd, and ModelOptimizer's.

    python tools/bench losses                        # [4, 16, 128, 128], the latents of SD3 at 1024 x 1024
    python tools/bench losses --shape 4 4 32 32

NVIDIA's ModelOptimizer (`modelopt.torch.fastgen`) is measured if it is installed.
"""

import importlib.util
from collections.abc import Callable

import torch
from dmdr_core.losses import dmd_loss
from torch import Tensor

from bench.common import fastest, options_of, print_table


def plain(x0: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """½ mean (x0 − sg(x0 − g))², g = (fake − real) / mean |x0 − real|, as the formula is written."""
    with torch.no_grad():
        scale = (x0 - real).abs().mean(dim=tuple(range(1, x0.ndim)), keepdim=True)
        target = x0 - (fake - real) / (scale + 1e-8)
    return 0.5 * (x0 - target).square().mean()


def losses() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"dmd_loss": dmd_loss, "plain autograd": plain}
    if importlib.util.find_spec("modelopt") is not None:
        from modelopt.torch.fastgen.losses import vsd_loss

        found["ModelOptimizer"] = vsd_loss
    return found


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--shape", type=int, nargs=4, default=[4, 16, 128, 128])
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    x0, real, fake = (torch.randn(options.shape) for _ in range(3))
    x0.requires_grad_()

    def both(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(x0, real, fake), x0)

    seconds = fastest({name: both(loss) for name, loss in losses().items()}, options.repeats)
    rows = [[name, found * 1e3, found / seconds["dmd_loss"]] for name, found in seconds.items()]
    print_table(["loss", "ms", "ratio to dmd_loss"], rows)


if __name__ == "__main__":
    main()
