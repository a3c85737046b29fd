"""State which argument of a module is the image, and what the other arguments are."""

import enum
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


class _Marker(enum.Enum):
    # A member of an enum stays the same object when it is copied or pickled.
    IMAGE_INPUT = enum.auto()

    def __repr__(self) -> str:
        return self.name


IMAGE_INPUT = _Marker.IMAGE_INPUT
"""Stands for the images in ``load_model(..., inputs=...)``."""


# The hooks as well, so that whoever attaches and removes hooks need not know of this class.
_REGISTRIES = (
    *("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
)


class ImageInputs(nn.Module):
    """Wrap a module with any arguments as a function of images ``(n, c, h, w)``, of videos or of signals.

    The children, parameters, buffers and hooks of the wrapped module are those of the wrapper too, so that layer names
    do not change.

    Args:
        inner: the module.
        inputs: as for :func:`~featvis_func.load_model`.
        reverse: whether the module expects the channels in reverse order, BGR instead of RGB.

    Raises:
        ValueError: If ``inputs`` has another form, does not say where the images go, or does not fit the signature of
            the module's ``forward``.

    >>> import torch
    >>> class Scaled(nn.Module):
    ...     def forward(self, image, scale):
    ...         return image * scale
    >>> ImageInputs(Scaled(), (IMAGE_INPUT, 2))(torch.ones(1, 3, 1, 1)).flatten()
    tensor([2., 2., 2.])
    """

    def __init__(self, inner: nn.Module, inputs: Any, *, reverse: bool = False) -> None:
        super().__init__()
        # Stored without registration, which would prefix all layer names with "inner.". Both modules share the
        # registries; so do their deep copies, since deepcopy copies each object once.
        self.__dict__["inner"] = inner
        for registry in _REGISTRIES:
            self.__dict__[registry] = getattr(inner, registry)
        self.reverse = reverse
        # Tensors are attributes, so that a fingerprint covers them; the structure refers to them by name.
        self._tensors: list[str] = []
        if inputs is IMAGE_INPUT or isinstance(inputs, tuple | list | Mapping):
            self._inputs: Any = self._declare(tuple(inputs) if isinstance(inputs, list) else inputs)
            if not _contains_marker(self._inputs):
                raise ValueError(
                    f"inputs= does not say where the images go: put fv.IMAGE_INPUT there, got {_shorten(inputs)}"
                )
            self._check_signature()
        elif callable(inputs):
            self.__dict__["_inputs"] = inputs  # A module would be registered as a child of the wrapped module.
        else:
            raise ValueError(
                f"inputs= must be a tuple of arguments, a dict of keyword arguments, or a function of the images that"
                f" returns one, got {_shorten(inputs)}"
            )

    def __call__(self, images: Tensor) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Call the wrapped module, which runs the hooks; they would run twice otherwise."""
        return self.forward(images)

    def forward(self, images: Tensor) -> Any:
        """Return the output of the wrapped module for images ``(n, c, h, w)``."""
        images = images.flip(1) if self.reverse else images
        if isinstance(self._inputs, tuple | list | dict | _Marker):
            given = self._fill(self._inputs, images)
        else:
            given = self._inputs(images)
        positional, keyword = _as_arguments(given)
        return self.__dict__["inner"](*positional, **keyword)

    @property
    def training(self) -> bool:
        """Whether the wrapped module is in training mode."""
        return self.__dict__["inner"].training

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        if "inner" in self.__dict__:  # The constructor of nn.Module sets the mode as well.
            self.__dict__["inner"].training = mode

    def train(self, mode: bool = True) -> "ImageInputs":
        """Set the mode of the wrapped module and of those inside it."""
        self.__dict__["inner"].train(mode)
        if isinstance(self._inputs, nn.Module):
            self._inputs.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ImageInputs":
        """Move or convert the tensors of the wrapped module, and the fixed inputs."""
        self.__dict__["inner"]._apply(fn, recurse)
        for name in self._tensors:
            setattr(self, name, fn(getattr(self, name)))
        if isinstance(self._inputs, nn.Module):
            self._inputs._apply(fn)
        return self

    def extra_repr(self) -> str:
        """Describe the arguments; a fingerprint covers this text."""
        inner, inputs = type(self.__dict__["inner"]).__name__, self._inputs
        written = repr(inputs) if isinstance(inputs, tuple | list | dict | _Marker) else _name_of(inputs)
        return f"{inner}, inputs={written}" + (", reverse=True" if self.reverse else "")

    def _declare(self, value: Any) -> Any:
        """Replace the tensors of a structure by their names, and keep them as attributes."""
        if isinstance(value, Tensor):
            name = f"input_{len(self._tensors)}"
            self.__dict__[name] = value.detach()
            self._tensors.append(name)
            return _Fixed(name)
        if isinstance(value, Mapping):
            return {key: self._declare(entry) for key, entry in value.items()}
        if isinstance(value, tuple | list):
            return _like(value, [self._declare(entry) for entry in value])
        return value

    def _fill(self, value: Any, images: Tensor) -> Any:
        """Put the images, and the fixed tensors repeated for each of them, in their places."""
        if value is IMAGE_INPUT:
            return images
        if isinstance(value, _Fixed):
            tensor = getattr(self, value)
            # Cloned, because some modules write to their inputs.
            return tensor.expand(images.shape[0], *tensor.shape).clone()
        if isinstance(value, dict):
            return {key: self._fill(entry, images) for key, entry in value.items()}
        if isinstance(value, tuple | list):
            return _like(value, [self._fill(entry, images) for entry in value])
        return value

    def _check_signature(self) -> None:
        inner = self.__dict__["inner"]
        positional, keyword = _as_arguments(self._inputs)
        try:
            signature = inspect.signature(inner.forward)
        except (TypeError, ValueError):  # not a Python function
            return
        try:
            signature.bind(*positional, **keyword)
        except TypeError as error:
            raise ValueError(
                f"inputs= does not fit {type(inner).__name__}.forward{_parameters(signature)}: {error}"
            ) from error


class _Fixed(str):
    """The name of the attribute that holds a fixed tensor."""

    __slots__ = ()


def original(module: nn.Module) -> nn.Module:
    """Return the user's module inside an :class:`ImageInputs`, or the module itself.

    >>> net = nn.Identity()
    >>> original(ImageInputs(net, (IMAGE_INPUT,))) is net
    True
    """
    return module.__dict__["inner"] if isinstance(module, ImageInputs) else module


def with_inputs(module: nn.Module, inputs: Any) -> ImageInputs:
    """Wrap a module, or replace the inputs of one that is wrapped; the order of the channels is kept."""
    reverse = isinstance(module, ImageInputs) and module.reverse
    return ImageInputs(original(module), inputs, reverse=reverse)


def check_takes_one(module: nn.Module) -> None:
    """Check that a module can be called with images alone.

    Raises:
        ValueError: If its ``forward`` needs other arguments.

    >>> check_takes_one(nn.Bilinear(2, 2, 2))
    Traceback (most recent call last):
        ...
    ValueError: Bilinear.forward(input1, input2) cannot be called with images alone (missing a required argument:
    'input2'); say which argument is the image, and what the others are: load_model(module, inputs=(fv.IMAGE_INPUT,
    ...)) or inputs={'input1': fv.IMAGE_INPUT, ...}
    """
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # not a Python function
        return
    try:
        signature.bind(None)
    except TypeError as error:
        first = next(iter(signature.parameters), "image")
        raise ValueError(
            f"{type(module).__name__}.forward{_parameters(signature)} cannot be called with images alone ({error}); say"
            f" which argument is the image, and what the others are: load_model(module, inputs=(fv.IMAGE_INPUT, ...))"
            f" or inputs={{{first!r}: fv.IMAGE_INPUT, ...}}"
        ) from error


def _as_arguments(given: Any) -> Arguments:
    """Split what a user gives into positional and keyword arguments.

    As in ``torch.onnx.export``, a dict at the end of a tuple of several entries holds keyword arguments.

    >>> _as_arguments((1, {"scale": 2})), _as_arguments(({"scale": 2},)), _as_arguments({"scale": 2}), _as_arguments(1)
    (((1,), {'scale': 2}), (({'scale': 2},), {}), ((), {'scale': 2}), ((1,), {}))
    """
    if isinstance(given, dict):
        return (), given
    if not isinstance(given, tuple):
        return (given,), {}
    if len(given) > 1 and isinstance(given[-1], dict):
        return given[:-1], given[-1]
    return given, {}


def _contains_marker(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_contains_marker(entry) for entry in value.values())
    if isinstance(value, tuple | list):
        return any(_contains_marker(entry) for entry in value)
    return value is IMAGE_INPUT


def _like(value: tuple[Any, ...] | list[Any], entries: list[Any]) -> Any:
    """Return entries in the type of a tuple, named tuple or list."""
    return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)


def _parameters(signature: inspect.Signature) -> str:
    """Return the names of the parameters, with the defaults but without the types."""
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))


def _name_of(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def _shorten(value: Any) -> str:
    return f"a {type(value).__name__}" if not isinstance(value, str | int | float | None) else repr(value)
