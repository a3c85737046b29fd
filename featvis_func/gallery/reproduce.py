"""The command and the Python call that make a filter's image again."""

import inspect
import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from featvis_func.rendering.api import render
from featvis_func.rendering.presets import REDIRECT

_DEFAULTS = {name: p.default for name, p in inspect.signature(render).parameters.items() if p.default is not p.empty}
_OPTIONS = (
    "steps", "size", "seed", "views", "lr", "image", "optimizer", "tolerance", "redirect", "precision", "compile",
    "deterministic", "saliency", "snapshots",
)  # fmt: skip
_IN_PYTHON_ALONE = {"saliency"}
_CHANNEL = re.compile(r"channel\('[^']*'\)|channel\(\"[^\"]*\"\)")
_NAMED = re.compile(r"(?:texturenet|[a-z-]+:\S+)")
_FILE = re.compile(r"(?P<name>.+) sha256:[0-9a-f]{64}")


class Recipe(NamedTuple):
    """How one image is made again."""

    command: str | None
    """For a shell; ``None`` where there is none: for modules and parts of one's own."""
    call: str
    """For Python."""


def recipe(config: dict[str, Any], layer: str, number: int, seed: int, *, filters: Sequence[int] = ()) -> Recipe:
    """How one filter's image is made again.

    Args:
        config: of a :class:`~featvis_func.Result` or of a sweep.
        layer: full name.
        number: of the filter.
        seed: of that filter, which may be another than the run's.
        filters: all that were rendered with it; an objective other than a channel may need them.

    >>> recipe({"model": "texturenet", "render": {"steps": 64, "seed": 0}}, "head", 3, 0).command
    'featvis render texturenet --layer head --filters 3 --steps 64'
    """
    options = _options(config, seed)
    model, objective = str(config.get("model", "")), str(config.get("objective", ""))
    known = _NAMED.fullmatch(model) is not None
    plain = not objective or _CHANNEL.fullmatch(objective) is not None
    lines = ["import featvis_func as fv"]
    weights = weights_file(config)
    if known:
        lines.append(f"model = fv.load_model({model!r}{'' if weights is None else f', weights={weights!r}'})")
    else:
        names = (("mean", "mean"), ("std", "std"), ("size", "input_size"))
        takes = {name: tuple(config[key]) for name, key in names if key in config}
        given = "".join(f", {name}={value!r}" for name, value in takes.items())
        lines.append(f"model = fv.load_model(module{given})  # module: your {model}")
    said = "".join(f", {name}={value!r}" for name, value in options.items())
    if plain:
        lines.append(f"result = fv.render(model, fv.channel({layer!r}), {number}{said})")
    else:
        names = ", ".join(sorted(set(re.findall(r"\b([a-z][a-z0-9_]*)\(", objective)) - {"tensor"}))
        lines.insert(1, f"from featvis_func.objective import {names}")
        lines.append(f"objective = {objective}")
        lines.append(f"result = fv.render(model, objective, {sorted(filters) or number}{said})")
    custom = "custom" in options.values() or not _IN_PYTHON_ALONE.isdisjoint(options)
    if not known or not plain or custom:
        return Recipe(None, "\n".join(lines))
    words = ["featvis", "render", model, *([] if weights is None else ["--weights", weights])]
    words += ["--layer", layer, "--filters", str(number)]
    for name, value in options.items():
        flag = f"--{name}"
        if value is True and name == "deterministic":
            words.append(flag)
        else:
            words += [flag, "x".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return Recipe(shlex.join(words), "\n".join(lines))


def weights_file(config: dict[str, Any]) -> str | None:
    """The name of the file that a model's weights came from, where they did not come with the model's own name."""
    file = _FILE.fullmatch(str(config.get("weights", "")))
    own = str(config.get("model", "")).partition(":")[2].startswith(("/", ".", "~"))
    return None if file is None or own else file["name"]


def _options(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The options that differ from what is taken when nothing is said."""
    given = {**config.get("render", config), "seed": seed}
    options: dict[str, Any] = {}
    for name in _OPTIONS:
        value = given.get(name, _DEFAULTS.get(name))
        value = tuple(value) if isinstance(value, list) else value
        if value == _DEFAULTS.get(name):
            continue
        if name == "size" and value == tuple(config.get("input_size", ())):
            continue
        if name == "redirect" and value == (REDIRECT if given.get("optimizer") == "default" else 0):
            continue
        options[name] = value
    if given.get("device", "cpu") != "cpu":
        options["device"] = given["device"]
    return options


def about(config: dict[str, Any]) -> list[tuple[str, str]]:
    """A configuration as words, for people: what was rendered, and how."""
    given = config.get("render", config)
    facts = {
        "Model": config.get("model"),
        "Weights": config.get("weights"),
        "Objective": config.get("objective"),
        "Input": " x ".join(map(str, config.get("input_size", ()))),
        "Images": " x ".join(map(str, given.get("size") or ())),
        "Steps": given.get("steps"),
        "Seed": given.get("seed"),
        "Views": given.get("views"),
        "Parameterisation": given.get("image"),
        "Optimiser": given.get("optimizer"),
        "Learning rate": given.get("lr"),
        "Tolerance": given.get("tolerance"),
        "Precision": given.get("precision"),
    }
    return [(name, str(value)) for name, value in facts.items() if value not in (None, "")]
