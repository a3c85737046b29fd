"""The table of options agrees with everything that repeats it or is made from it."""

import argparse
import inspect
import json
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

import featvis_func as fv
from featvis_func import cpu
from featvis_func.backbone import verify
from featvis_func.cli import main as cli
from featvis_func.cli.arguments import add_options, given_options
from featvis_func.cpu.malloc import kept_memory
from featvis_func.gallery.reproduce import reproduce
from featvis_func.models import Model
from featvis_func.rendering import optimizers, options, presets
from featvis_func.rendering.options import DEFAULTS, OPTIONS, SWEEP_OPTIONS, RenderOptions, flag_of
from featvis_func.sweep import dry_run, open_store, sweep
from featvis_func.types import Image, Optimizer, Transform

ALIASES = {alias: name for name, option in OPTIONS.items() for alias in option.aliases}
NOT_OPTIONS = ("model", "objective", "filters", "features", "progress")

pytestmark = pytest.mark.usefixtures("cached_tracing")


# --- the signature and the docstring of render ----------------------------------------------------------------------


def test_signature_of_render_repeats_names_and_defaults_in_order() -> None:
    parameters = inspect.signature(fv.render).parameters
    in_signature = {n: p.default for n, p in parameters.items() if n not in NOT_OPTIONS and n not in ALIASES}
    assert [*in_signature.items()] == [*DEFAULTS.items()]
    assert [field.name for field in fields(RenderOptions)] == [*DEFAULTS]
    assert {n: parameters[n].default for n in parameters if n in ALIASES} == dict.fromkeys(ALIASES)
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in (*DEFAULTS, *ALIASES))


def test_annotations_of_render_are_those_of_the_fields() -> None:
    of_fields = get_type_hints(
        RenderOptions, localns={"torch": torch, "Image": Image, "Optimizer": Optimizer, "Transform": Transform}
    )
    of_render = get_type_hints(fv.render)
    assert {name: of_render[name] for name in OPTIONS} == of_fields


def docstring_arguments(function: Callable[..., Any]) -> dict[str, str]:
    """Argument name -> its text in the ``Args:`` section, with white space normalised."""
    section = inspect.cleandoc(function.__doc__ or "").split("Args:\n", 1)[1].split("\n\n", 1)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def test_docstring_of_render_names_every_option_in_order() -> None:
    documented = docstring_arguments(fv.render)
    assert [name for name in documented if name not in NOT_OPTIONS and name not in ALIASES] == [*OPTIONS]
    assert [*documented] == [*inspect.signature(fv.render).parameters]


@pytest.mark.parametrize("name", OPTIONS)
def test_docstring_of_render_begins_with_the_help_text(name: str) -> None:
    def normalised(text: str) -> str:
        text = " ".join(text.replace("`", "").split())
        return text[:1].lower() + text[1:]

    help_text = normalised(OPTIONS[name].help)
    assert normalised(docstring_arguments(fv.render)[name]).startswith(help_text)


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_equal_the_keys_of_the_presets() -> None:
    assert tuple(presets.IMAGES) == options.IMAGES
    assert options.PRECISIONS == verify.PRECISIONS
    assert len(set(options.TRANSFORMS)) == len(options.TRANSFORMS)
    for name in options.TRANSFORMS:
        assert isinstance(presets.named_transform(name, image=(8, 8), size=(6, 6)), Transform)
    for name in options.OPTIMIZERS:
        assert isinstance(optimizers.optimizer_for(name, None, 4), Optimizer)
    with pytest.raises(ValueError, match=re.escape(f"expected one of {', '.join(options.OPTIMIZERS)}")):
        optimizers.optimizer_for("unknown", None, 4)
    with pytest.raises(ValueError, match=re.escape(f"expected one of {', '.join(options.TRANSFORMS)}")):
        presets.named_transform("unknown", image=(8, 8), size=(6, 6))


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("transforms", options.TRANSFORMS),
        ("image", options.IMAGES),
        ("optimizer", options.OPTIMIZERS),
        ("precision", options.PRECISIONS),
        ("compile", options.COMPILE),
    ],
)
def test_help_text_lists_the_names(name: str, names: tuple[str, ...]) -> None:
    assert OPTIONS[name].help.endswith(f": {', '.join(names)}")
    for known in names:
        values: dict[str, Any] = {name: known}
        assert getattr(RenderOptions(**values), name) == known
    with pytest.raises(ValueError, match=re.escape(f"unknown {name} 'unknown'; expected one of {', '.join(names)}")):
        RenderOptions.of({name: "unknown"}, function="render")


# --- the class ------------------------------------------------------------------------------------------------------


def test_options_import_no_torch() -> None:
    script = (
        "import sys, featvis_func.rendering.options\n"
        "sys.exit(' '.join({'torch', 'torchvision', 'numpy', 'PIL', 'safetensors'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_options_are_frozen_and_compare_by_value() -> None:
    given = RenderOptions(steps=3)
    with pytest.raises(FrozenInstanceError):
        given.steps = 4  # type: ignore[misc]
    assert given == RenderOptions(steps=3) != RenderOptions()
    assert hash(given) == hash(RenderOptions(steps=3))
    assert replace(given, steps=5).steps == 5
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        replace(given, steps=0)
    with pytest.raises(TypeError):
        RenderOptions(3)  # type: ignore[misc]


# --- unknown options and aliases ------------------------------------------------------------------------------------


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "make_renderer": lambda model, out, **given: fv.make_renderer(model, "5", [0], **given),
    "sweep": lambda model, out, **given: sweep(model, ["5"], [0], out=out, **given),
    "dry_run": lambda model, out, **given: dry_run(model, ["5"], [0], **given),
}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_unknown_option_raises_with_a_suggestion(tiny: Model, tmp_path: Path, function: str) -> None:
    message = rf"{function}\(\) has no option 'stepz'; did you mean 'steps'\?"
    with pytest.raises(TypeError, match=message):
        FUNCTIONS[function](tiny, tmp_path / "out", stepz=3)
    with pytest.raises(TypeError, match=rf"{function}\(\) has no option 'view'; did you mean .*'views'"):
        FUNCTIONS[function](tiny, tmp_path / "out", view="none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("function", ["sweep", "dry_run"])
def test_sweep_does_not_take_saliency(tiny: Model, tmp_path: Path, function: str) -> None:
    with pytest.raises(TypeError, match=rf"{function}\(\) has no option 'saliency'"):
        FUNCTIONS[function](tiny, tmp_path / "out", saliency=True)


def test_render_rejects_unknown_options(tiny: Model) -> None:
    with pytest.raises(TypeError, match="stepz"):
        fv.render(tiny, "5", [0], stepz=3)  # type: ignore[call-arg]


@pytest.mark.parametrize("function", [*FUNCTIONS, "render"])
@pytest.mark.parametrize("order", [("transforms", "views"), ("views", "transforms")], ids=" first, ".join)
def test_option_given_by_two_names_raises(tiny: Model, tmp_path: Path, function: str, order: tuple[str, str]) -> None:
    given = dict(zip(order, ("none", "lucid"), strict=True))
    call = FUNCTIONS.get(function, lambda model, out, **given: fv.render(model, "5", [0], **given))
    with pytest.raises(TypeError, match=rf"{function}\(\) got 'transforms' twice: it is also called views"):
        call(tiny, tmp_path / "out", **given)


@pytest.mark.slow
def test_views_is_an_alias_of_transforms_in_python(tiny: Model, tmp_path: Path) -> None:
    quick: dict[str, Any] = {"steps": 2, "size": 16}
    expected = fv.render(tiny, "5", [0], transforms="lucid", **quick)
    result = fv.render(tiny, "5", [0], views="lucid", **quick)
    assert torch.equal(result.images, expected.images)
    assert result.config == expected.config
    assert result.config["transforms"] == "lucid"
    assert "views" not in result.config
    renderer = fv.make_renderer(tiny, "5", [0], views="lucid", **quick)
    assert renderer.options.transforms == "lucid"
    assert torch.equal(renderer().images, expected.images)
    assert sweep(tiny, ["5"], [0], out=tmp_path / "out", views="lucid", progress=False, **quick).complete
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert "views" not in json.dumps(stored)
    assert open_store(tmp_path / "out")["5", 0].score == pytest.approx(float(expected.scores[0]))


# --- the command line -----------------------------------------------------------------------------------------------


def parsed(*words: str, command: str = "render") -> dict[str, Any]:
    """The options that a command line gives to the library."""
    out = ["--out", "out"] if command == "sweep" else []
    given = given_options(cli._parser().parse_args([command, *out, *words]))
    return {name: value for name, value in given.items() if command == "render" or name in SWEEP_OPTIONS}


def help_flags(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out))


def test_every_option_has_a_flag_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    of_render, of_sweep = help_flags("render", capsys), help_flags("sweep", capsys)
    for name, option in OPTIONS.items():
        flags = {flag_of(n) for n in (name, *option.aliases)}
        assert flags <= of_render
        # A sweep has a batch size and a device of its own.
        assert (flags <= of_sweep) == (option.in_sweep or name in ("batch_size", "device"))
    parser = argparse.ArgumentParser()
    add_options(parser, sweep=True)
    destinations = {action.dest for action in parser._actions} - {"help"}
    assert destinations == {*SWEEP_OPTIONS, "device"}


def test_command_line_defaults_are_those_of_the_table() -> None:
    expected = {**DEFAULTS, "retain_memory": True}
    assert parsed() == {name: value for name, value in expected.items() if name != "device"}
    assert parsed(command="sweep") == {name: expected[name] for name in SWEEP_OPTIONS}


@pytest.mark.parametrize("command", ["render", "sweep"])
def test_both_spellings_of_transforms_on_the_command_line(command: str) -> None:
    for flag in ("--transforms", "--views"):
        assert parsed(flag, "lucid", command=command)["transforms"] == "lucid"


# Values of each option as they are written on the command line, beside its default.
VALUES: dict[str, list[str]] = {
    "steps": ["1", "33", "4096"],
    "size": ["1", "224", "48x64", "16x48x64"],
    "seed": ["1", "7", str(2**64 - 1)],
    "transforms": [*options.TRANSFORMS],
    "lr": ["0.15", "1e-05", "3", "0.1234567890123"],
    "image": [*options.IMAGES],
    "optimizer": [*options.OPTIMIZERS],
    "batch_size": ["auto", "1", "17"],
    "tolerance": ["0", "0.05", "1e-3"],
    "redirect": ["0", "1", "16", "40"],
    "smooth_pools": [*options.SMOOTH_POOLS],
    "precision": [*options.PRECISIONS],
    "compile": [*options.COMPILE],
    "deterministic": [""],
    "saliency": [""],
    "snapshots": ["0", "2", "9"],
    "bands": ["0", "3,2,1", "5,0,5"],
    "retain_memory": [""],
}


def words_of(values: dict[str, str]) -> list[str]:
    """Flags with their values; a flag without an argument has the value ``""``."""
    return [word for name, text in values.items() for word in (flag_of(name), text) if word]


def effective(given: RenderOptions) -> RenderOptions:
    """The options with defaults that depend on others filled in, without those on which no image depends."""
    redirect = given.redirect
    if redirect is None:
        redirect = optimizers.REDIRECT if given.optimizer in optimizers.REDIRECTING else 0
    return replace(given, redirect=redirect, batch_size="auto", retain_memory=False)


def check_round_trip(values: dict[str, str], *, input_size: tuple[int, int] = (224, 224)) -> None:
    """Command line -> options -> run.json -> the command line in a gallery -> the same options."""
    given = RenderOptions.of(parsed(*words_of(values)), function="render")
    config = {"model": "texturenet", "input_size": list(input_size), **effective(given).to_json()}
    recorded = json.loads(json.dumps(config))
    command = reproduce(recorded, "head", 3, recorded["seed"]).command
    assert command is not None
    words = shlex.split(command)
    assert words[:2] == ["featvis", "render"]
    again = RenderOptions.of(parsed(*words[2:]), function="render")
    if given.size == input_size:
        again = replace(again, size=input_size)
    assert effective(again) == effective(given)


for _name, _option in OPTIONS.items():  # of an option that is not listed above, its default
    if _name != "device":
        VALUES.setdefault(_name, ["" if _option.parse is None else str(DEFAULTS[_name])])


@pytest.mark.parametrize("name", VALUES)
def test_single_option_survives_the_round_trip_through_run_json(name: str) -> None:
    texts = VALUES[name]
    options_given = [parsed(*words_of({name: text}))[name] for text in texts]
    assert len({repr(value) for value in options_given}) == len(texts)
    for text in texts:
        check_round_trip({name: text})


def test_combined_options_survive_the_round_trip_through_run_json() -> None:
    generator = random.Random(0)
    for _ in range(60):
        names = generator.sample([*VALUES], generator.randint(2, len(VALUES)))
        check_round_trip({name: generator.choice(VALUES[name]) for name in names})


def test_device_survives_the_round_trip_through_run_json() -> None:
    config = {"model": "texturenet", **RenderOptions(device="cuda").to_json()}
    command = reproduce(json.loads(json.dumps(config)), "head", 3, 0).command
    assert command is not None
    assert cli._parser().parse_args(shlex.split(command)[1:]).device == "cuda"


def test_run_json_records_every_option_that_an_image_may_depend_on(tiny: Model) -> None:
    config = fv.render(tiny, "5", [0], steps=1, deterministic=True, saliency=True).config
    recorded = {name for name, option in OPTIONS.items() if option.recorded}
    assert recorded <= set(config)
    assert set(OPTIONS) - recorded == {"retain_memory"}
    assert json.loads(json.dumps(config)) == config
    assert not {"views", "slots", "transparency"} & set(config)


# --- retain_memory --------------------------------------------------------------------------------------------------


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that gets one entry each time that a run enters ``kept_memory``."""
    assert cpu.SPECIALIZATION[-1] is kept_memory
    entries: list[str] = []

    @contextmanager
    def record() -> Iterator[None]:
        entries.append("kept_memory")
        yield

    monkeypatch.setattr(cpu, "SPECIALIZATION", (*cpu.SPECIALIZATION[:-1], record))
    return entries


@pytest.mark.slow
def test_render_retains_memory_only_if_requested(tiny: Model, entered: list[str]) -> None:
    quick: dict[str, Any] = {"steps": 1, "size": 16, "device": "cpu"}
    fv.render(tiny, "5", [0], **quick)
    fv.make_renderer(tiny, "5", [0], **quick)()
    assert entered == []
    fv.render(tiny, "5", [0], retain_memory=True, **quick)
    assert len(entered) == 1
    fv.make_renderer(tiny, "5", [0], retain_memory=True, **quick)()
    assert len(entered) == 2


def test_sweep_retains_memory_unless_switched_off(tiny: Model, tmp_path: Path, entered: list[str]) -> None:
    quick: dict[str, Any] = {"steps": 1, "size": 16, "device": "cpu", "progress": False}
    sweep(tiny, ["5"], [0], out=tmp_path / "without", retain_memory=False, **quick)
    assert entered == []
    sweep(tiny, ["5"], [0], out=tmp_path / "with", **quick)
    assert len(entered) == 1
    dry_run(tiny, ["5"], [0], steps=1, size=16)
    assert len(entered) == 1
    stored = [(tmp_path / name / "run.json").read_text() for name in ("with", "without")]
    assert stored[0] == stored[1], "the setting is recorded, though no image depends on it"


@pytest.mark.parametrize(("flags", "expected"), [([], 1), (["--retain-memory"], 1), (["--no-retain-memory"], 0)])
@pytest.mark.parametrize("command", ["render", "sweep"])
def test_command_line_retains_memory_unless_switched_off(
    tiny: Model,
    tmp_path: Path,
    entered: list[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    flags: list[str],
    expected: int,
) -> None:
    monkeypatch.setattr("featvis_func.models.load_model", lambda *_, **__: tiny)
    layer = ["--layer", "5", "--no-gallery"] if command == "render" else ["--layers", "5"]
    quick = ["--filters", "0", "--steps", "1", "--size", "16", "--device", "cpu", "--out", str(tmp_path / "out")]
    assert cli.main([command, *layer, *quick, *flags]) == 0
    assert len(entered) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "fourier"), ({"transforms": "maco"}, "phase"), ({"transforms": "maco", "image": "pixel"}, "pixel")],
    ids=str,
)
def test_maco_brings_its_parameterisation(given: dict[str, Any], expected: str) -> None:
    assert RenderOptions(**given).image == expected
    assert RenderOptions(**given).to_json()["image"] == expected
