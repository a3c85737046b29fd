"""Find the number of channels and the kind of input (images, videos, signals) of a user's module, by calling it."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featvis_func.models.copying import private_copy

# Input size for each number of axes, where a module does not state its own: signals, images, videos.
ASSUMED_SIZES = {1: (1024,), 2: (224, 224), 3: (16, 112, 112)}
_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


class Candidate(NamedTuple):
    """A possible input of a module."""

    axes: int
    """1 for signals, 2 for images, 3 for videos."""
    channels: int


def candidates(module: nn.Module, axes: int | None = None, channels: int | None = None) -> list[Candidate]:
    """List the distinct inputs of a module's convolutions, in order.

    Args:
        module: the module.
        axes: number of axes apart from the channels, if known; convolutions of that kind come first then.
        channels: number of channels, if known.

    >>> candidates(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 4, 3)))
    [Candidate(axes=2, channels=1), Candidate(axes=2, channels=8)]
    """
    found = list(_inputs_of_convolutions(module))
    if axes is not None:
        found = [c for c in found if c.axes == axes] + [c._replace(axes=axes) for c in found if c.axes != axes]
    if channels is not None:
        found = [c._replace(channels=channels) for c in found]
    return list(dict.fromkeys(found))


def find_input(
    module: nn.Module, possible: Sequence[Candidate], sizes: Mapping[int, tuple[int, ...]]
) -> tuple[Candidate, bool]:
    """Find the first possible input with which a forward pass works.

    The passes are those of a private copy. A pass that fails outside of all convolutions, after at least one of them,
    rejects the size of the input and not its channels, so that it is the second choice.

    Args:
        module: not changed.
        possible: inputs to try, in order.
        sizes: input size for each number of axes.

    Returns:
        The input, and whether it is certain. If nothing works it is the first.

    >>> net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 2, 1))
    >>> find_input(net, [Candidate(2, 8), Candidate(2, 4)], {2: (9, 9)})
    (Candidate(axes=2, channels=4), True)
    """
    try:
        copied = private_copy(module, share_parameters=True)
    except Exception:  # Whoever renders it is told why.
        return possible[0], False
    weight = next((p for p in copied.parameters() if p.is_floating_point()), torch.zeros(()))
    # Convolutions also take an input without the axis of the batch. Its length must not be taken for channels.
    taken = {channels for _, channels in _inputs_of_convolutions(copied)}
    batch = next(n for n in range(1, len(taken) + 2) if n not in taken)
    accepted: list[Candidate] = []
    with _unobserved():
        for candidate in possible:
            shape = (batch, candidate.channels, *sizes[candidate.axes])
            try:
                works = _passes(copied, torch.full(shape, 0.5, dtype=weight.dtype, device=weight.device))
            except Exception:
                continue
            if works:
                return candidate, True
            accepted.append(candidate)
    return (accepted[0], True) if accepted else (possible[0], False)


def _passes(module: nn.Module, images: Tensor) -> bool:
    """Return whether a forward pass works, or False if it fails for another reason than the channels.

    Raises:
        Exception: of any kind, if it fails in a convolution or before all of them.
    """
    entered: list[nn.Module] = []
    left: list[nn.Module] = []
    handles = []
    for child in module.modules():
        if isinstance(child, nn.modules.conv._ConvNd):
            handles.append(child.register_forward_pre_hook(lambda m, _: entered.append(m)))
            handles.append(child.register_forward_hook(lambda m, *_: left.append(m)))
    try:
        module(images)
    except Exception:
        if not left or len(entered) > len(left):
            raise
        return False
    finally:
        for handle in handles:
            handle.remove()
    return True


def _inputs_of_convolutions(module: nn.Module) -> Iterator[Candidate]:
    for child in module.modules():
        axes = next((axes for kind, axes in _CONVOLUTIONS.items() if isinstance(child, kind)), None)
        channels: Any = getattr(child, "in_channels", 0)
        if axes is not None and channels > 0:
            yield Candidate(axes, channels)


@contextmanager
def _unobserved() -> Iterator[None]:
    """Within the block, compute without gradients and warnings; afterwards, the random generators are as before."""
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    before = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else []
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        # All threads share the generators: restored only where something has drawn from them.
        if not torch.equal(torch.get_rng_state(), before[0]):
            torch.set_rng_state(before[0])
        for device, state in enumerate(before[1]):
            if not torch.equal(torch.cuda.get_rng_state(device), state):
                torch.cuda.set_rng_state(state, device)
