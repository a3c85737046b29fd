"""The command and the Python call that render a filter's image again."""

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from featvis_func.io.display import describe_bands, display_of
from featvis_func.io.filter_spec import ranges
from featvis_func.models.loading import names_code
from featvis_func.rendering.optimizers import REDIRECT, REDIRECTING
from featvis_func.rendering.options import DEFAULTS, OPTIONS, default_image, flag_of, label_of

_NAMED_MODEL = re.compile(r"(?:texturenet|[a-z-]+:\S+)")
_DEPENDENT = ("alignment", "diversity")  # functions whose objectives depend on all images that are rendered together
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
        layer: full name, with its axes where they were stated; or the label of a family.
        number: of the filter, or of a member's image.
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
    # Without a name, no preset tells what the model takes.
    all_stated = ("normalisation", "size") if made_by_code or not named else tuple(config.get("stated", ()))
    kinds = {"normalisation": (("mean", "mean"), ("std", "std")), "size": (("size", "input_size"),)}
    for kind in all_stated:
        stated |= {name: tuple(config[key]) for name, key in kinds.get(kind, ()) if key in config}
    if not named:
        stated.pop("weights", None)
        lines.append(f"# module: your {model}, which is not recorded")
    arguments = "".join(f", {name}={value!r}" for name, value in stated.items())
    lines.append(f"model = fv.load_model({repr(model) if named else 'module'}{arguments})")
    family = config["families"].get(layer) if "families" in config else config.get("family")
    record = {**config, **(family or {})}
    code = record.get("objective_code")
    chosen = ["--layer", layer, "--filters", str(number)]
    if code is None and family is None and (not config.get("objective") or "objective_code" in config):
        objective = f"fv.channel({layer!r}), {number}"
    else:
        if code is None:  # recorded without its code, by another version
            code = {"expression": "own_objective", "functions": [], "values": {"own_objective": record["objective"]}}
        lines += _define_values(code["values"], record, lines)
        if code["functions"]:
            lines.insert(1, f"from featvis_func.objective import {', '.join(sorted(code['functions']))}")
        lines.append(f"objective = {code['expression']}")
        rendered, text = _rendered_together(family, code, number, filters)
        objective = f"objective, {rendered}"
        command = record.get("command")
        chosen = None if command is None else [*command, "--filters", text]
    lines += [f"# {name}: your own, which is not recorded" for name in own_parts]
    written = "".join(f", {name}={name if name in own_parts else repr(value)}" for name, value in options.items())
    lines.append(f"result = fv.render(model, {objective}{written})")
    if not named or chosen is None or own_parts:
        return Reproduction(None, "\n".join(lines))
    words = ["featvis", "render", model]
    for name, value in stated.items():
        separator = "x" if name == "size" else ","
        words.append("--input-size" if name == "size" else flag_of(name))
        words.append(separator.join(map(str, value)) if isinstance(value, tuple) else value)
    words += chosen
    for name, value in options.items():
        words.append(flag_of(name))
        if OPTIONS[name].parse is not None:
            words.append(OPTIONS[name].separator.join(map(str, value)) if isinstance(value, tuple) else str(value))
    return Reproduction(shlex.join(words), "\n".join(lines))


def _define_values(values: Mapping[str, str], record: Mapping[str, Any], imports: list[str]) -> list[str]:
    """Write the lines that define the variables of an objective's code, or say what to define.

    Args:
        values: variable -> what it stands for.
        record: of the objective: its tensors, and the file that holds them.
        imports: the lines before, which get another import if a file is read.
    """
    tensors = record.get("tensors", {})
    stored = [name for name in values if name in tensors] if "file" in record else []
    lines = []
    if stored:
        imports.insert(1, "from safetensors.torch import load_file")
        lines = ["# The path is relative to the folder of the sweep.", f"members = load_file({record['file']!r})"]
        lines += [f"{name} = members[{name!r}]" for name in stored]
    for name, meaning in values.items():
        if name not in stored:
            digest = f"; the SHA-256 of its numbers is {tensors[name]['sha256']}" if name in tensors else ""
            lines.append(f"# {name}: {meaning}, which is not recorded{digest}")
    return lines


def _rendered_together(
    family: Mapping[str, Any] | None, code: Mapping[str, Any], number: int, filters: Sequence[int]
) -> tuple[str, str]:
    """The images that are rendered with one because it depends on them: for Python, and for a command.

    >>> _rendered_together({"group": 4}, {"functions": ["facets"]}, 6, ())
    ('range(4, 8)', '4-7')
    """
    if family is None or (family["group"] == 1 and not set(_DEPENDENT).isdisjoint(code["functions"])):
        every = sorted(filters) or [number]
        return str(every if filters else number), ranges(tuple(every))
    if family["group"] == 1:
        return str(number), str(number)
    first = number - number % family["group"]
    last = first + family["group"] - 1
    return f"range({first}, {last + 1})", f"{first}-{last}"


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
        # Before that option, the gradients of pools were their own.
        before = "no" if name == "smooth_pools" and recorded.get("optimizer") == "default" else default
        value = recorded.get(name, before)
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
