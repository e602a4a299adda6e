"""A family without a VAE: a small network that predicts the velocity of pixels, for class labels."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from dmdr_models.families.class_labels import ClassLabels
from dmdr_models.families.network_family import NetworkFamily, in_own_dtype
from torch import nn

from pixel_plugins.layout import PIXELS


class PixelNetwork(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, in_channels=3, sample_size=16, num_classes=10, width=16):
        super().__init__()
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.first = nn.Conv2d(in_channels + 1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, in_channels, 3, padding=1)

    def forward(self, x, t, class_labels):
        time = t.to(x.dtype).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        hidden = self.first(torch.cat([x, time], dim=1)) + self.label_embed(class_labels)[:, :, None, None]
        return self.last(hidden + self.middle(hidden.relu()))


class Pixels(ClassLabels, NetworkFamily):
    layout = PIXELS
    network_class = PixelNetwork
    lora_targets = ("first", "middle", "last")

    def predict(self, network, x_t, t, condition, **named):
        x_t, condition = in_own_dtype(network, x_t, condition)
        return network(x_t, t, **condition, **named).float()
