"""The options of a rendering, in one table. Imports no torch, so that ``featvis --help`` is instant.

Each field of :class:`RenderOptions` has a type, a default and an :class:`Option`: its help text, what checks it, and
how the command line reads it. :func:`featvis_func.render` repeats the names and defaults in its signature, where
editors see them; everything else is made from this table: :func:`featvis_func.make_renderer`,
:func:`featvis_func.sweep.sweep`, the command line, ``run.json``, and the command and call that reproduce an image in a
gallery. A new option takes three edits beside its use: a field here, and its name in the signature and in the docstring
of ``render``, which begins with the help text.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from featvis_func.validation import check_bands, check_float, check_int, check_name, check_seed, check_size, suggest

if TYPE_CHECKING:
    import torch

    from featvis_func.types import Image, Optimizer, Transform

# What goes by name. The functions that make these are in `rendering/presets.py` and `rendering/optimizers.py`; a test
# compares the names.
TRANSFORMS = ("default", "small", "published", "lucid", "maco", "none")
IMAGES = ("fourier", "pixel", "phase", "laplacian_pyramid", "cppn", "alpha")
OPTIMIZERS = ("default", "activation", "published", "adam", "adamw", "nadam", "sgd")
PRECISIONS = ("auto", "float32", "bfloat16")
COMPILE = ("auto", "yes", "no", "cudagraphs")
SMOOTH_POOLS = ("auto", "yes", "no")


class Option(NamedTuple):
    """What is known of one option, beside its name, type and default."""

    help: str
    """A phrase; the docstring of ``render`` begins with it."""
    check: Callable[[Any], Any]
    """A value -> the same in the library's own type, or ValueError."""
    parse: Callable[[str], Any] | None = str
    """A command line argument -> a value, or ValueError; ``None`` for a flag without an argument."""
    metavar: str | None = None
    default_text: str = ""
    """The default in words, where it depends on something else."""
    aliases: tuple[str, ...] = ()
    """Further names of the same option."""
    in_sweep: bool = True
    """Whether a sweep takes it."""
    recorded: bool = True
    """Whether it is written into ``run.json``, because an image, or how it is shown, may depend on it."""
    separator: str = "x"
    """Between the numbers of a value that has several, on the command line."""


def _option(default: Any, help: str, check: Callable[[Any], Any], parse: Any = str, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(help, check, parse, **more)})


def _optional(check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else check(value)


def _named(kind: str, names: tuple[str, ...]) -> Callable[[Any], Any]:
    """Checks a name; an object of the user's own is checked where its type is known."""

    def check(value: Any) -> Any:
        if isinstance(value, str):
            check_name(kind, value, names)
        return value

    return check


def _check_precision(value: Any) -> str:
    check_name("precision", value, PRECISIONS)
    return value


def _check_choice(name: str, value: Any, words: tuple[str, ...]) -> str:
    """Checks one of some words, two of which are also ``True`` and ``False``."""
    word = ("yes" if value else "no") if isinstance(value, bool) else value
    check_name(name, word, words)
    return word


def _check_batch_size(value: Any) -> int | str:
    return value if value == "auto" else check_int("batch_size", value, 1)


def _check_size(value: Any) -> int | tuple[int, ...]:
    """One number stays one: how many sides it stands for depends on the model."""
    sides = check_size(value)
    return sides if isinstance(value, tuple | list) else sides[0]


def parse_size(text: str) -> int | tuple[int, ...]:
    """Read ``N`` or ``HxW`` pixels, or ``TxHxW`` with the number of frames.

    >>> parse_size("224"), parse_size("48x64"), parse_size("16x112x112")
    (224, (48, 64), (16, 112, 112))
    """
    sides = text.split("x")
    if len(sides) > 3 or not all(side.isdecimal() for side in sides):
        raise ValueError(f"{text!r} is not a size; expected N or HxW pixels, or TxHxW with the number of frames")
    return int(text) if len(sides) == 1 else tuple(map(int, sides))


def parse_bands(text: str) -> tuple[int, ...]:
    """Read channel numbers with commas between them.

    >>> parse_bands("3,2,1"), parse_bands("4")
    ((3, 2, 1), (4,))
    """
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"{text!r} are not bands; expected 1 or 3 channel numbers, such as 3,2,1")
    return check_bands([int(word) for word in words])


def parse_batch_size(text: str) -> int | str:
    """Read a number or ``auto``."""
    if text != "auto" and not text.isdecimal():
        raise ValueError(f"{text!r} is not a batch size; expected a number or auto")
    return text if text == "auto" else int(text)


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """How filters are rendered. Values are checked when an instance is made.

    Raises:
        ValueError: a value that its option does not take.

    >>> RenderOptions(steps=64).steps, RenderOptions().image
    (64, 'fourier')
    >>> RenderOptions(image="fourrier")
    Traceback (most recent call last):
        ...
    ValueError: unknown image 'fourrier'; expected one of fourier, pixel, phase, laplacian_pyramid, cppn, alpha
    """

    steps: int = _option(48, "number of gradient ascent steps", lambda v: check_int("steps", v, 1), int)
    size: int | tuple[int, ...] | None = _option(
        None,
        "image size in pixels, one number for a square or height and width; frames, height and width of a video,"
        " length of a signal",
        _optional(_check_size),
        parse_size,
        metavar="N|HxW|TxHxW",
        default_text="the model's input size",
    )
    seed: int = _option(0, "seed of all randomness; another seed gives other images", check_seed, int)
    transforms: "str | Transform" = _option(
        "default",
        f"random transforms of the image before each step: {', '.join(TRANSFORMS)}",
        _named("transforms", TRANSFORMS),
        aliases=("views",),
    )
    lr: float | None = _option(
        None,
        "learning rate",
        _optional(lambda v: check_float("learning rate", v, above=0)),
        float,
        default_text="that of the optimizer",
    )
    image: "str | Image | None" = _option(
        None,
        f"parameterisation of the image: {', '.join(IMAGES)}",
        _optional(_named("image", IMAGES)),
        default_text="fourier; phase with transforms maco",
    )
    optimizer: "str | Optimizer" = _option(
        "default", f"optimizer: {', '.join(OPTIMIZERS)}", _named("optimizer", OPTIMIZERS)
    )
    batch_size: int | str = _option(
        "auto",
        "largest number of filters that are rendered at the same time",
        _check_batch_size,
        parse_batch_size,
        in_sweep=False,
    )
    tolerance: float | None = _option(
        None,
        "stop a filter whose best score rises by no more than this fraction in 8 steps",
        _optional(lambda v: check_float("tolerance", v, 0)),
        float,
        metavar="FRACTION",
        default_text="every filter takes all steps",
    )
    redirect: int | None = _option(
        None,
        "number of first steps in which gradients are redirected past rectifiers that block them",
        _optional(lambda v: check_int("redirect", v, 0)),
        int,
        metavar="STEPS",
        default_text="16 with the optimizers default and activation, else 0",
    )
    smooth_pools: bool | str = _option(
        "auto",
        f"whether strided max pools pass gradients to all positive values of a window: {', '.join(SMOOTH_POOLS)}",
        lambda v: _check_choice("smooth_pools", v, SMOOTH_POOLS),
        default_text="auto: with the optimizer default",
    )
    device: "torch.device | str | None" = _option(
        None, "device to compute on, such as cuda", lambda v: v, default_text="where the model is", in_sweep=False
    )
    precision: str = _option("auto", f"precision of the backbone: {', '.join(PRECISIONS)}", _check_precision)
    compile: bool | str = _option(
        "auto",
        f"whether the step is compiled: {', '.join(COMPILE)}",
        lambda v: _check_choice("compile", v, COMPILE),
    )
    deterministic: bool = _option(False, "bit-equal reruns on CUDA, where they are slower", bool, None)
    saliency: bool = _option(
        False, "accumulate the magnitude of the score's gradient at each pixel", bool, None, in_sweep=False
    )
    snapshots: int = _option(
        0, "number of images of each filter to keep over its run", lambda v: check_int("snapshots", v or 0, 0), int
    )
    bands: tuple[int, ...] | None = _option(
        None,
        "channels that pictures show: one as grey, or three as red, green and blue, numbered from 0",
        _optional(check_bands),
        parse_bands,
        metavar="N[,N,N]",
        default_text="the first three",
        separator=",",
    )
    retain_memory: bool = _option(
        False,
        "keep the memory that a step on the CPU frees for the next step, by settings of the whole process",
        bool,
        None,
        recorded=False,
    )

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.check(getattr(self, name)))
        if self.image is None:
            object.__setattr__(self, "image", default_image(self.transforms))

    @classmethod
    def of(cls, arguments: Mapping[str, Any], *, function: str, names: tuple[str, ...] | None = None) -> Self:
        """The options among keyword arguments, by their names or aliases.

        Args:
            arguments: of the function; an alias that is ``None`` counts as not given.
            function: its name, for the error message.
            names: the options that it takes; default: all.

        Raises:
            TypeError: an unknown name, or an option that is given by two names.
            ValueError: a value that its option does not take.

        >>> RenderOptions.of({"views": "lucid"}, function="render").transforms
        'lucid'
        """
        known = tuple(OPTIONS) if names is None else names
        aliases = {alias: name for name in known for alias in OPTIONS[name].aliases}
        values: dict[str, Any] = {}
        for given, value in arguments.items():
            name = aliases.get(given, given)
            if name not in known:
                raise TypeError(f"{function}() has no option {given!r}{suggest(given, [*known, *aliases])}")
            if name != given and value is None:
                continue
            if name in values and DEFAULTS[name] not in (value, values[name]):
                raise TypeError(
                    f"{function}() got {name!r} twice: it is also called {', '.join(OPTIONS[name].aliases)}"
                )
            if name not in values or value != DEFAULTS[name]:
                values[name] = value
        return cls(**values)

    def to_json(self, names: tuple[str, ...] | None = None) -> dict[str, Any]:
        """Values as JSON holds them, objects of the user's own as ``"custom"``.

        Args:
            names: of options; default: those that are recorded.

        >>> RenderOptions(size=(48, 64)).to_json()["size"]
        [48, 64]
        """
        chosen = tuple(name for name, option in OPTIONS.items() if option.recorded) if names is None else names
        return {name: _json_value(getattr(self, name)) for name in chosen}


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return list(value) if type(value) is tuple else "custom"


OPTIONS: dict[str, Option] = {entry.name: entry.metadata["option"] for entry in fields(RenderOptions)}
"""Option name -> what is known of it, in the order of ``render``'s signature."""

DEFAULTS: dict[str, Any] = {entry.name: entry.default for entry in fields(RenderOptions)}

SWEEP_OPTIONS: tuple[str, ...] = tuple(name for name, option in OPTIONS.items() if option.in_sweep)
"""The options that a sweep takes; it has a batch size and a device of its own."""


def default_image(transforms: Any) -> str:
    """The parameterisation that goes with a preset of random transforms.

    >>> default_image("default"), default_image("maco")
    ('fourier', 'phase')
    """
    return "phase" if transforms == "maco" else "fourier"


def flag_of(name: str) -> str:
    """The command line's flag of an option.

    >>> flag_of("retain_memory")
    '--retain-memory'
    """
    return f"--{name.replace('_', '-')}"


def label_of(name: str) -> str:
    """An option's name as a heading for people.

    >>> label_of("batch_size")
    'Batch size'
    """
    return {"lr": "Learning rate", "image": "Parameterisation"}.get(name, name.replace("_", " ").capitalize())


def default_of(name: str) -> str:
    """An option's default, for people.

    >>> default_of("steps"), default_of("size")
    ('48', "the model's input size")
    """
    default = DEFAULTS[name]
    words = ("on" if default else "off") if isinstance(default, bool) else str(default)
    return OPTIONS[name].default_text or words
