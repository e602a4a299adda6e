"""The MLP that computes the score of ImageReward, and of LAION's aesthetic predictor, which adopted it."""

from torch import nn

_LINEARS = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}  # index in the released nn.Sequential -> width


def score_head(inputs: int) -> nn.Sequential:
    """Linear layers inputs-1024-128-64-16-1 without activations, under their released names "0", "2", "4", "6", "7".

    The other indices were dropout layers in training.
    """
    layers: list[nn.Module] = [nn.Identity() for _ in range(1 + max(_LINEARS))]
    for place, outputs in _LINEARS.items():
        layers[place] = nn.Linear(inputs, outputs)
        inputs = outputs
    return nn.Sequential(*layers)
