"""Small modules that several test modules share."""

import torch
from torch import nn

from featvis_func.models import IMAGENET_MEAN, IMAGENET_STD, Model, load_model

TINY_SIZE = 20


def make_tiny() -> nn.Sequential:
    """Make a small random CNN in evaluation mode, with in-place ReLUs and nontrivial batch norm statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 12, 3, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 6, 3),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        )
        norm = module[1]
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2.0)
    return module.eval()


VIDEO_SIZE = (6, 16, 20)
SIGNAL_SIZE = (64,)


def make_video_net() -> nn.Sequential:
    """Make a small random network of videos of 3 channels; layer ``"2"`` has 4 channels of maps ``(t, h, w)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv3d(3, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv3d(6, 4, 3, stride=2),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        ).eval()


def make_signal_net() -> nn.Sequential:
    """Make a small random network of signals of 2 channels; layer ``"2"`` has 4 channels of maps ``(t,)``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv1d(2, 6, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.Conv1d(6, 4, 5, stride=2),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(4, 5),
        ).eval()


class OneConv(nn.Module):
    """A convolution of 4 filters; subclasses define the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)


def load_toy(module: nn.Module, size: int | tuple[int, ...]) -> Model:
    """Load a module with all of its input stated: the channels of its first convolution, normalised as ImageNet's."""
    channels = next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)), 3)
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ([0.0] * channels, [1.0] * channels)
    return load_model(module, size=size, mean=mean, std=std)
