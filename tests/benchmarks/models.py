"""A small model of 224 px images for the tests of the benchmarks."""

import torch
from torch import nn


def tiny_cnn(*, inplace: bool = False) -> nn.Sequential:
    """Return a random CNN of 224 px images whose module "2" has 8 channels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 7, stride=8),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2),
            nn.ReLU(inplace=inplace),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )
    return model.eval()
