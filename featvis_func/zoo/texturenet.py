"""TextureNet: a small convolutional classifier of procedural textures, shipped with its weights."""

from collections import OrderedDict
from importlib import resources

import safetensors.torch
from torch import Tensor, nn

from featvis_func.zoo.textures import CLASSES

SIZE = 96
"""Default height and width of the input in pixels; any size of at least 16 works."""
MEAN: tuple[float, float, float] = (0.54, 0.5, 0.47)  # of the textures, RGB in [0, 1]
STD: tuple[float, float, float] = (0.29, 0.275, 0.275)

_WEIGHTS = "texturenet.safetensors"


def _block(inputs: int, outputs: int, *, kernel: int = 3, pooled: bool = False) -> nn.Sequential:
    layers = OrderedDict[str, nn.Module](
        conv=nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        norm=nn.BatchNorm2d(outputs),
        act=nn.ReLU(),
    )
    if pooled:
        layers["pool"] = nn.AvgPool2d(4, stride=2, padding=1)
    return nn.Sequential(layers)


class TextureNet(nn.Module):
    """Six blocks of convolution, batch norm and ReLU; global average pooling; a linear head.

    Blocks 1, 2 and 4 end in average pooling with a 4 x 4 window and stride 2. Unlike with strided convolutions, max
    pooling or 3 x 3 windows, each pixel is in the same number of windows, and the highest frequencies are removed
    before they alias, so that visualisations have no checkerboard artefacts. The receptive field of ``block6.conv`` is
    78 x 78 pixels.

    >>> import torch
    >>> net = TextureNet()
    >>> net(torch.zeros(2, 3, 64, 80)).shape
    torch.Size([2, 32])
    """

    def __init__(self) -> None:
        super().__init__()
        self.block1 = _block(3, 24, kernel=5, pooled=True)
        self.block2 = _block(24, 48, pooled=True)
        self.block3 = _block(48, 80)
        self.block4 = _block(80, 96, pooled=True)
        self.block5 = _block(96, 128)
        self.block6 = _block(128, 96)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(96, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits ``(n, classes)`` of normalised images ``(n, 3, h, w)``; see ``normalise``."""
        x = self.block3(self.block2(self.block1(images)))
        x = self.block6(self.block5(self.block4(x)))
        return self.head(self.pool(x).flatten(1))


def normalise(images: Tensor) -> Tensor:
    """Normalise images for TextureNet: ``(images - MEAN) / STD`` per channel.

    Args:
        images: ``(..., 3, h, w)``, RGB in [0, 1].

    Returns:
        A tensor of the same shape, dtype and device.

    >>> import torch
    >>> normalise(torch.tensor(MEAN)[:, None, None]).flatten().tolist()
    [0.0, 0.0, 0.0]
    """
    mean, std = (images.new_tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images - mean) / std


def texturenet(*, pretrained: bool = True) -> TextureNet:
    """Create a TextureNet in eval mode, on the CPU.

    Args:
        pretrained: whether to load the weights shipped with the package; otherwise they are drawn from the global
            generator of torch.

    Returns:
        The network. Its input is normalised by ``normalise``.

    >>> import torch
    >>> from featvis_func.zoo.textures import texture
    >>> image = torch.from_numpy(texture("spirals", seed=0))
    >>> CLASSES[int(texturenet()(normalise(image)[None]).argmax())]
    'spirals'
    """
    net = TextureNet()
    if pretrained:
        data = resources.files("featvis_func.zoo").joinpath(_WEIGHTS).read_bytes()
        net.load_state_dict(safetensors.torch.load(data))
    return net.eval()
