"""Loggers: their output, read back from TensorBoard's event files and from W&B's offline runs."""

import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import featvis_func as fv
from featvis_func.io.display import Display
from featvis_func.io.pil import picture
from featvis_func.rendering.loggers import _BINS, Logger, tensorboard_logger, wandb_logger
from featvis_func.rendering.result import Result
from tests.toys import load_toy

KINDS = {"grey": (1, 5, 6), "two": (2, 5, 6), "rgb": (3, 5, 6), "four": (4, 5, 6), "five": (5, 5, 6)}
KINDS |= {"video": (3, 4, 5, 6), "signal": (2, 30)}


def make(count: int = 3, *, shape: tuple[int, ...] = KINDS["rgb"], seed: int = 0, first: int = 7) -> Result:
    """A result whose last filter has no finite score."""
    generator = torch.Generator().manual_seed(seed)
    scores, history = torch.rand(2, count, generator=generator)[0], torch.rand(4, count, generator=generator)
    scores[-1], history[:, -1] = -math.inf, math.nan
    history[2:, 0] = math.nan  # Stopped after two steps.
    return Result(
        images=torch.rand(count, *shape, generator=generator),
        activations=torch.rand(count, 2, 3, generator=generator),
        scores=scores,
        best_step=torch.tensor([1] * (count - 1) + [-1]),
        filters=tuple(range(first, first + count)),
        status=("ok",) * (count - 1) + ("nonfinite",),
        history=history,
        steps=torch.tensor([2] + [4] * (count - 1)),
        config={"layer": "block.conv", "steps": 4, "lr": None},
    )


def as_rgb(image: PIL.Image.Image) -> np.ndarray:
    """Pixels as TensorBoard stores them: a grey image has three equal channels."""
    return np.asarray(image.convert("RGB") if image.mode == "L" else image)


# --- TensorBoard ----------------------------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    kinds = ("COMPRESSED_HISTOGRAMS", "IMAGES", "SCALARS", "HISTOGRAMS", "TENSORS")
    return accumulator.EventAccumulator(str(folder), {getattr(accumulator, kind): 0 for kind in kinds}).Reload()


def test_tensorboard_logs_images_scores_and_text(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    results = {0: make(), 500: make(seed=1)}
    with tensorboard_logger(tmp_path / "run") as log:
        for step, result in results.items():
            log(result, step)
    log_file, root = events(tmp_path / "run"), "featvis/block.conv"
    assert set(log_file.Tags()["images"]) == {f"{root}/{name}" for name in ("grid", "image/7", "image/8", "image/9")}
    for i, number in enumerate((7, 8, 9)):
        logged = log_file.Images(f"{root}/image/{number}")
        assert [event.step for event in logged] == [0, 500]
        for event, result in zip(logged, results.values(), strict=True):
            pixels = PIL.Image.open(io.BytesIO(event.encoded_image_string))
            np.testing.assert_array_equal(np.asarray(pixels), np.asarray(picture(result.images[i])))
    curves = {f"{root}/history/{step}/{number}" for step in (0, 500) for number in (7, 8)}
    assert set(log_file.Tags()["scalars"]) == {f"{root}/score/7", f"{root}/score/8"} | curves
    for i, number in enumerate((7, 8)):
        scores = [(event.step, event.value) for event in log_file.Scalars(f"{root}/score/{number}")]
        assert scores == [(step, result.scores[i].item()) for step, result in results.items()]
        for step, result in results.items():
            curve = [(event.step, event.value) for event in log_file.Scalars(f"{root}/history/{step}/{number}")]
            assert curve == [*enumerate(result.history[: result.steps[i], i].tolist())]
    histogram = log_file.Histograms(f"{root}/scores")[0].histogram_value
    finite = results[0].scores[:2].double()
    assert histogram.num == sum(histogram.bucket) == 2
    assert (histogram.min, histogram.max) == (finite.min().item(), finite.max().item())
    table = log_file.Tensors(f"{root}/filters/text_summary")[1].tensor_proto.string_val[0].decode()
    assert f"| 7 | {results[500].scores[0]:.4g} | 1 | 2 | ok |" in table
    assert "| 9 | -inf | -1 | 4 | nonfinite |" in table
    text = log_file.Tensors(f"{root}/config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(line.startswith("    ") for line in text.splitlines()), "the text would not be shown verbatim"
    assert json.loads(text) == results[0].config


@pytest.mark.parametrize("display", [Display(), Display(alpha=True)], ids=["opaque", "alpha"])
@pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
def test_tensorboard_accepts_every_kind_of_image(tmp_path: Path, shape: tuple[int, ...], display: Display) -> None:
    pytest.importorskip("tensorboard")
    result = make(shape=shape)
    if display.alpha:
        result = replace(result, config={**result.config, "alpha": True})
    with tensorboard_logger(str(tmp_path), prefix="") as log:
        log(result)
    log_file = events(tmp_path)
    for tag, image in {"image/7": picture(result.images[0], display), "grid": result.grid()}.items():
        (event,) = log_file.Images(f"block.conv/{tag}")
        pixels = np.asarray(PIL.Image.open(io.BytesIO(event.encoded_image_string)))
        np.testing.assert_array_equal(pixels, as_rgb(image))
    assert {event.value for event in log_file.Scalars("block.conv/history/7")} == set(result.history[:2, 0].tolist())


def test_given_writer_stays_open(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(tmp_path))
    with tensorboard_logger(writer) as log:
        log(make(), 3)
    writer.add_scalar("loss", 0.5, 4)
    writer.close()
    assert len([*tmp_path.glob("events*")]) == 1, "the writer was closed, and opened a second file"
    log_file = events(tmp_path)
    assert log_file.Scalars("loss")[0].value == 0.5
    assert log_file.Images("featvis/block.conv/grid")[0].step == 3


@pytest.mark.parametrize("score", [0.0, 2.5, -3e38, 1e21], ids=str)
def test_histogram_of_equal_scores(tmp_path: Path, score: float) -> None:
    pytest.importorskip("tensorboard")
    with tensorboard_logger(tmp_path) as log:
        log(replace(make(), scores=torch.full((3,), score)))
    histogram = events(tmp_path).Histograms("featvis/block.conv/scores")[0].histogram_value
    assert sum(histogram.bucket) == 3


def test_tensorboard_result_without_a_finite_score(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with tensorboard_logger(tmp_path) as log:
        log(make(1))
    tags = events(tmp_path).Tags()
    assert not tags["scalars"]
    assert not tags["histograms"]
    assert len(tags["images"]) == 2


def test_module_can_be_logged_while_it_is_trained(tmp_path: Path) -> None:
    """The example of the module's docstring."""
    pytest.importorskip("tensorboard")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    with fv.tensorboard_logger(tmp_path) as log:
        for step in range(4):
            module(torch.rand(2, 3, 16, 16)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 2 == 0:
                log(fv.render(load_toy(module, size=16), "0", range(2), steps=2, progress=False), step)
    assert module.training
    logged = events(tmp_path).Images("featvis/0/image/1")
    assert [event.step for event in logged] == [0, 2]
    assert logged[0].encoded_image_string != logged[1].encoded_image_string, "the same weights were rendered twice"


# --- Weights & Biases -----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B without a network, which writes into the test's folder only."""
    wandb = pytest.importorskip("wandb")
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield tmp_path
    wandb.teardown()  # It would keep these settings otherwise.


def records(run_file: Path) -> Iterator[Any]:
    """The records of a run's log: blocks of 32 KiB with parts, each after a header of checksum, length and kind."""
    record = import_module("wandb.proto.wandb_internal_pb2").Record
    data, at, parts = run_file.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # A complete record, or the last part of one.
            yield record.FromString(parts)
            parts = b""


def flat(value: Any, name: str) -> dict[str, Any]:
    """Join nested keys by slashes, as W&B itself does for some."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part, below in value.items() for key, leaf in flat(below, f"{name}/{part}").items()}


def named(items: Any) -> dict[str, Any]:
    pairs = [(item.key or "/".join(item.nested_key), json.loads(item.value_json)) for item in items]
    return {key: leaf for name, value in pairs for key, leaf in flat(value, name).items()}


def runs(folder: Path) -> list[Path]:
    """The logs of the finished runs; a process of W&B's own writes them, and ends at ``teardown`` only."""
    import_module("wandb").teardown()
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def history_of(run_file: Path) -> list[dict[str, Any]]:
    return [named(r.history.item) for r in records(run_file) if r.HasField("history")]


def pixels_of(run_file: Path, path: str) -> np.ndarray:
    return np.asarray(PIL.Image.open(run_file.parent / "files" / path))


@pytest.mark.slow
@pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
def test_wandb_logs_images_scores_and_history(offline: Path, shape: tuple[int, ...]) -> None:
    results = {0: make(shape=shape), 500: make(shape=shape, seed=1)}
    with wandb_logger("filters", name="first") as log:
        for step, result in results.items():
            log(result, step)
    (file,) = runs(offline)
    root = "featvis/block.conv"
    entries = {entry["_step"]: entry for entry in history_of(file)}
    assert [*entries] == [0, 500]
    for step, result in results.items():
        entry = entries[step]
        assert entry[f"{root}/images/captions"] == [
            f"block.conv:7, score {result.scores[0]:.4g}, ok",
            f"block.conv:8, score {result.scores[1]:.4g}, ok",
            "block.conv:9, score -inf, nonfinite",
        ]
        for path, image in zip(entry[f"{root}/images/filenames"], result.images, strict=True):
            np.testing.assert_array_equal(pixels_of(file, path), np.asarray(picture(image)))
        np.testing.assert_array_equal(pixels_of(file, entry[f"{root}/grid/path"]), np.asarray(result.grid()))
        assert [entry[f"{root}/score/{number}"] for number in (7, 8)] == result.scores[:2].tolist()
        assert f"{root}/score/9" not in entry
        assert sum(entry[f"{root}/scores/values"]) == 2
        assert entry[f"{root}/scores/bins"][::_BINS] == sorted(result.scores[:2].tolist())
        table = json.loads((file.parent / "files" / entry[f"{root}/history_table/path"]).read_text())
        assert {(at, key): value for at, key, value in table["data"]} == {
            (at, str(number)): result.history[at, i].item()
            for i, number in enumerate((7, 8))
            for at in range(int(result.steps[i]))
        }
    configs = [named(record.config.update) for record in records(file) if record.HasField("config")]
    assert {f"{root}/{name}": value for name, value in results[0].config.items()} in configs


@pytest.mark.slow
def test_wandb_result_without_a_finite_score(offline: Path) -> None:
    with wandb_logger("filters") as log:
        log(make(1))
    (entry,) = history_of(runs(offline)[0])
    assert entry["featvis/block.conv/images/captions"] == ["block.conv:7, score -inf, nonfinite"]
    assert not any("score" in name for name in entry)


@pytest.mark.slow
def test_given_run_stays_open(offline: Path) -> None:
    with import_module("wandb").init(project="mine") as run:
        with wandb_logger(run, prefix="seen") as log:
            log(make(), 2)
        run.log({"loss": 0.5}, step=2)
        with wandb_logger("other") as log:
            log(make())
    files = runs(offline)
    assert len(files) == 2, "the logger has used the active run"
    entries = [entry for file in files for entry in history_of(file)]
    both = [entry for entry in entries if "loss" in entry]
    assert (len(entries), len(both)) == (2, 1)
    assert both[0]["seen/block.conv/grid/_type"] == "image-file"


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_logger", "package", "extra"),
    [
        (lambda: tensorboard_logger("folder"), "tensorboard", "tensorboard"),
        (lambda: wandb_logger("project"), "wandb", "wandb"),
    ],
    ids=["tensorboard", "wandb"],
)
def test_missing_package_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_logger: Any, package: str, extra: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"'{package}_logger' needs the package {package}.*featvis-func\[{extra}\]'"):
        make_logger()
    assert not [*tmp_path.iterdir()]


def test_given_writer_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)

    class Writer:
        def __init__(self) -> None:
            self.tags: list[str] = []

        def __getattr__(self, name: str) -> Any:
            return lambda tag, *args, **options: self.tags.append(tag)

    writer = Writer()
    tensorboard_logger(writer)(make(1))
    prefix = "featvis/block.conv"
    assert writer.tags == [f"{prefix}/{name}" for name in ("image/7", "grid", "filters", "config")]


@pytest.mark.parametrize("where", [None, 3, [1]], ids=str)
@pytest.mark.parametrize("make_logger", [tensorboard_logger, wandb_logger])
def test_invalid_destination_raises(make_logger: Any, where: Any) -> None:
    with pytest.raises(ValueError, match=r"expected .* got"):
        make_logger(where)


def test_options_for_an_existing_run_raise() -> None:
    class Run:
        log = config = None

    with pytest.raises(ValueError, match="options are for a new run, but an existing run was given; got mode"):
        wandb_logger(Run(), mode="offline")


@pytest.mark.parametrize(
    ("given", "step", "message"),
    [
        ("image", 0, "expected a Result, as render returns it, got 'image'"),
        (make(), -1, "step must be at least 0, got -1"),
        (make(), 1.5, "step must be a whole number, got 1.5"),
    ],
    ids=["not a result", "negative", "fraction"],
)
def test_invalid_result_or_step_raises(given: Any, step: Any, message: str) -> None:
    log = Logger(lambda result, step: pytest.fail("the result was written"), lambda: None)
    with pytest.raises(ValueError, match=message):
        log(given, step)


# --- names of members -----------------------------------------------------------------------------------------------

NAMED = {"7": "golden retriever", "8": "a/b|c <script>\n*x*", "9": "  "}


def with_names() -> Result:
    result = make()
    return replace(result, config={**result.config, "layer": "directions:fc", "names": NAMED})


def test_tensorboard_names_members() -> None:
    from unittest.mock import Mock

    writer = Mock()
    tensorboard_logger(writer)(with_names())
    root = "featvis/directions:fc"
    tags = [call.args[0] for call in writer.add_image.call_args_list]
    assert tags == [f"{root}/image/{t}" for t in ("7_golden_retriever", "8_a_b_c_script_x", "9")] + [f"{root}/grid"]
    scalars = {call.args[0].removeprefix(f"{root}/") for call in writer.add_scalar.call_args_list}
    assert {"score/7_golden_retriever", "history/8_a_b_c_script_x"} <= scalars
    table = writer.add_text.call_args_list[0].args[1].splitlines()
    assert table[0] == "| filter | score | best step | steps | status | name |"
    assert [line.count(" | ") for line in table if "---" not in line] == [5] * 4
    assert table[3].endswith(r"| ok | a/b\|c \<script\> \*x\* |")


def test_wandb_captions_name_members(monkeypatch: pytest.MonkeyPatch) -> None:
    from unittest.mock import Mock

    wandb, run = Mock(), Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    wandb_logger(run)(with_names())
    captions = [call.kwargs.get("caption", "") for call in wandb.Image.call_args_list]
    assert captions[0].startswith("directions:fc:7, golden retriever, score ")
    assert captions[1].startswith("directions:fc:8, a/b|c <script> *x*, score ")
    assert captions[2] == "directions:fc:9, score -inf, nonfinite"
    entry = run.log.call_args.args[0]
    assert "featvis/directions:fc/score/7_golden_retriever" in entry
    assert wandb.plot.line_series.call_args.kwargs["keys"][1] == "8_a_b_c_script_x"
