"""The command and the Python call that render a filter's image again."""

import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from featvis_func.io.display import describe_bands, display_of
from featvis_func.models.loading import names_code
from featvis_func.rendering.optimizers import REDIRECT, REDIRECTING
from featvis_func.rendering.options import DEFAULTS, OPTIONS, default_image, flag_of, label_of

_NAMED_MODEL = re.compile(r"(?:texturenet|[a-z-]+:\S+)")
_WEIGHTS_FILE = re.compile(r"(?P<name>.+) sha256:[0-9a-f]{64}")


class Reproduction(NamedTuple):
    """How one image is rendered again."""

    command: str | None
    """For a shell; ``None`` where no command can say it: for modules, objectives and parts of the user's own."""
    call: str
    """For Python. Comments name what a record does not hold: a module, tensors, objects of the user's own."""


def reproduce(
    config: dict[str, Any], layer: str, number: int, seed: int, *, filters: Sequence[int] = ()
) -> Reproduction:
    """Write the command and the call that render one filter's image again.

    Args:
        config: of a :class:`~featvis_func.Result` or of a sweep.
        layer: full name, with its axes where they were stated.
        number: of the filter.
        seed: of that filter, which may differ from the run's.
        filters: all that were rendered with it; an objective other than a channel may depend on them.

    >>> reproduce({"model": "texturenet", "render": {"steps": 32, "seed": 0}}, "head", 3, 0).command
    'featvis render texturenet --layer head --filters 3 --steps 32'
    """
    options = _changed_options(config, seed)
    own_parts = [name for name, value in options.items() if value == "custom"]
    model = str(config.get("model", ""))
    made_by_code = names_code(model)
    named = made_by_code or _NAMED_MODEL.fullmatch(model) is not None
    weights = weights_file(config)
    lines = ["import featvis_func as fv"]
    stated: dict[str, Any] = {} if weights is None else {"weights": weights}
    if made_by_code or not named:  # no preset tells what the model takes
        names = (("mean", "mean"), ("std", "std"), ("size", "input_size"))
        stated |= {name: tuple(config[key]) for name, key in names if key in config}
    if not named:
        stated.pop("weights", None)
        lines.append(f"# module: your {model}, which is not recorded")
    arguments = "".join(f", {name}={value!r}" for name, value in stated.items())
    lines.append(f"model = fv.load_model({repr(model) if named else 'module'}{arguments})")
    code = config.get("objective_code")
    every_filter = code is None and (not config.get("objective") or "objective_code" in config)
    if every_filter:
        objective = f"fv.channel({layer!r}), {number}"
    else:
        objective = f"objective, {sorted(filters) or number}"
        if code is None:  # recorded without its code, by another version
            code = {"expression": "own_objective", "functions": [], "values": {"own_objective": config["objective"]}}
        if code["functions"]:
            lines.insert(1, f"from featvis_func.objective import {', '.join(sorted(code['functions']))}")
        lines += [f"# {name}: {meaning}, which is not recorded" for name, meaning in code["values"].items()]
        lines.append(f"objective = {code['expression']}")
    lines += [f"# {name}: your own, which is not recorded" for name in own_parts]
    written = "".join(f", {name}={name if name in own_parts else repr(value)}" for name, value in options.items())
    lines.append(f"result = fv.render(model, {objective}{written})")
    if not named or not every_filter or own_parts:
        return Reproduction(None, "\n".join(lines))
    words = ["featvis", "render", model]
    for name, value in stated.items():
        separator = "x" if name == "size" else ","
        words.append("--input-size" if name == "size" else flag_of(name))
        words.append(separator.join(map(str, value)) if isinstance(value, tuple) else value)
    words += ["--layer", layer, "--filters", str(number)]
    for name, value in options.items():
        words.append(flag_of(name))
        if OPTIONS[name].parse is not None:
            words.append(OPTIONS[name].separator.join(map(str, value)) if isinstance(value, tuple) else str(value))
    return Reproduction(shlex.join(words), "\n".join(lines))


def weights_file(config: dict[str, Any]) -> str | None:
    """The name of the file that a model's weights came from, unless the model's own name says where they are."""
    file = _WEIGHTS_FILE.fullmatch(str(config.get("weights", "")))
    own = str(config.get("model", "")).partition(":")[2].startswith(("/", ".", "~"))
    return None if file is None or own else file["name"]


def _changed_options(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """The options that differ from their defaults."""
    recorded = {**config.get("render", config), "seed": seed, **{k: config[k] for k in ("bands",) if k in config}}
    options: dict[str, Any] = {}
    for name, option in OPTIONS.items():
        if not option.recorded or name in ("batch_size", "device"):
            continue  # which change an image by rounding only
        default = default_image(recorded.get("transforms")) if name == "image" else DEFAULTS[name]
        value = recorded.get(name, default)
        value = tuple(value) if isinstance(value, list) else value
        if value == default:
            continue
        if name == "size" and value == tuple(config.get("input_size", ())):
            continue
        if name == "redirect" and value == (REDIRECT if recorded.get("optimizer") in REDIRECTING else 0):
            continue
        options[name] = value
    if recorded.get("device") not in (None, "cpu", "custom"):
        options["device"] = recorded["device"]
    return options


def describe(config: dict[str, Any]) -> list[tuple[str, str]]:
    """A configuration for people: what was rendered, and how, as labels and values."""
    recorded = config.get("render", config)
    facts = {
        "Model": config.get("model"),
        "Weights": config.get("weights"),
        "Objective": config.get("objective"),
        "Input": " x ".join(map(str, config.get("input_size", ()))),
    }
    for name, option in OPTIONS.items():
        value = recorded.get(name)
        if option.recorded and value is not False:
            facts[label_of(name)] = " x ".join(map(str, value)) if isinstance(value, list) else value
    if "mean" in config and len(config.get("input_size", (1, 1))) > 1:
        facts[label_of("bands")] = describe_bands(display_of(config), len(config["mean"]))
    return [(label, str(value)) for label, value in facts.items() if value not in (None, "")]
