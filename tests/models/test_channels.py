"""The channels and the kind of input of a user's module, found by calling a private copy of it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featvis_func.models import channels as channels_module
from featvis_func.models import load_model

RANGE: dict[str, Any] = {"value_range": (0, 1)}  # which leaves the channels to be found


class HeadFirst(nn.Module):
    """The head is registered before the stem."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 2, 1)
        self.stem = nn.Conv2d(channels, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu())


class Auxiliary(nn.Module):
    """A branch sees the first channel alone, and is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.Conv2d(1, 8, 3)
        self.stem = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.edges(x[:, :1]) + self.stem(x)


class FixedSize(HeadFirst):
    """Takes images of 28 px only."""

    def __init__(self) -> None:
        super().__init__(2)
        self.linear = nn.Linear(2 * 26 * 26, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(super().forward(x).flatten(1))


class Grey(nn.Module):
    """Convolves the mean of the channels, so that any number of them works."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.mix = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.conv(x.mean(1, keepdim=True)))


class Split(nn.Module):
    """Takes a colour image and its depth: four channels, which no convolution has."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Conv2d(3, 8, 3)
        self.depth = nn.Conv2d(1, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.colour(x[:, :3]) + self.depth(x[:, 3:])


class Writes(nn.Module):
    """Writes to its input, counts its calls, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(8, 2, 1)
        self.stem = nn.Conv2d(2, 8, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.modes.append(self.training)
        x.sub_(0.5)
        x += torch.rand(())
        return self.head(self.stem(x))


@pytest.mark.parametrize(
    ("make", "channels", "assumed"),
    [
        (HeadFirst, 4, ("size",)),
        (lambda: HeadFirst(3), 3, ("size",)),
        (lambda: HeadFirst(1), 1, ("size",)),
        (Auxiliary, 3, ("size",)),
        (FixedSize, 2, ("size",)),  # fails behind the convolutions for the assumed size, and only with 2 channels
        (Grey, 1, ("size",)),
        (Writes, 2, ("size",)),
        (Split, 3, ("size", "channels")),
        (lambda: nn.Sequential(nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(4, 4, 3)), 6, ("size",)),
        (lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3)), 3, ("size",)),
    ],
)
def test_channels_are_those_with_which_a_forward_pass_works(
    make: Callable[[], nn.Module], channels: int, assumed: tuple[str, ...]
) -> None:
    model = load_model(make(), **RANGE)
    assert (model.channels, model.assumed) == (channels, assumed)


def test_stated_channels_are_not_questioned(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a forward pass")

    monkeypatch.setattr(channels_module, "private_copy", fail)
    model = load_model(Split(), mean=[0.5] * 4, std=[0.5] * 4)
    assert (model.channels, model.assumed) == (4, ("size",))
    assert load_model(nn.Sequential(nn.Conv2d(7, 4, 3)), **RANGE).channels == 7  # the only candidate


def test_the_users_module_and_random_numbers_are_left_alone() -> None:
    module = Writes().train()
    hook = module.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    load_model(module, **RANGE)
    assert torch.equal(state, torch.get_rng_state())
    assert module.training
    assert module.modes == []
    assert list(module._forward_hooks) == [hook.id]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_module_may_hold_what_cannot_be_copied() -> None:
    module = HeadFirst(4)
    module.numbers = (n for n in range(3))  # type: ignore[assignment]
    model = load_model(module, **RANGE)
    assert (model.channels, model.assumed) == (4, ("size",))


def test_a_module_that_cannot_be_copied_is_assumed_to_take_its_first_convolutions_channels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("cannot be copied")

    monkeypatch.setattr(channels_module, "private_copy", fail)
    model = load_model(HeadFirst(4), **RANGE)
    assert (model.channels, model.assumed) == (8, ("size", "channels"))


def test_modules_in_half_precision_are_called_with_their_dtype() -> None:
    assert load_model(HeadFirst(4).to(torch.bfloat16), **RANGE).channels == 4


@pytest.mark.parametrize(
    ("make", "channels", "size"),
    [
        (lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.Conv3d(4, 3, 3)), 2, (16, 112, 112)),
        (lambda: nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3)), 1, (1024,)),
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 3, 3)), 2, (1024,)),
        (lambda: nn.Sequential(nn.Conv3d(1, 4, 3)), 1, (16, 112, 112)),
        (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3)), 1, (224, 224)),
    ],
)
def test_videos_and_signals_are_told_by_the_convolutions(
    make: Callable[[], nn.Module], channels: int, size: tuple[int, ...]
) -> None:
    model = load_model(make(), **RANGE)
    assert (model.channels, model.size, model.assumed) == (channels, size, ("size",))


class Frames(nn.Module):
    """Convolves each frame of a video by itself; a convolution over time, of another width, is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Conv1d(4, 2, 3)
        self.frame = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.frame(x.movedim(2, 1).flatten(0, 1)).mean((-2, -1))
        return self.time(maps.unflatten(0, (len(x), -1)).movedim(1, 2))


def test_a_stated_size_tells_the_kind_of_input() -> None:
    model = load_model(Frames(), size=(8, 20, 20), **RANGE)
    assert (model.channels, model.size, model.assumed) == (3, (8, 20, 20), ())
    length = load_model(nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3)), size=100, **RANGE)
    assert (length.channels, length.size, length.assumed) == (2, (100,), ())


def test_a_size_of_another_kind_of_input_raises() -> None:
    with pytest.raises(ValueError, match=r"Sequential takes videos of size \(t, h, w\), got the input size 64"):
        load_model(nn.Sequential(nn.Conv3d(2, 4, 3)), size=64, **RANGE)
    with pytest.raises(ValueError, match=r"texturenet takes images of size \(h, w\), got the input size \(8, 64, 64\)"):
        load_model("texturenet", size=(8, 64, 64))


def test_frames_are_read_from_the_configuration() -> None:
    module = nn.Sequential(nn.Conv3d(3, 4, 3))
    module.image_size, module.num_frames = 32, 5  # type: ignore[assignment]
    model = load_model(module, **RANGE)
    assert (model.size, model.assumed) == ((5, 32, 32), ())
