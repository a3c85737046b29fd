"""The command line: files, printed text, exit codes, and what remains after an error."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch
from torchvision.models import _api as torchvision_api

from featvis_func.cli import main as cli
from featvis_func.gallery.reproduce import reproduce
from featvis_func.models import Model, load_model
from featvis_func.rendering import api as rendering
from featvis_func.rendering import renderer, resolve
from featvis_func.rendering.options import IMAGES, OPTIMIZERS, OPTIONS, TRANSFORMS, flag_of
from tests.toys import load_toy

QUICK = ["--steps", "1", "--size", "16", "--filters", "0-1", "--device", "cpu"]
pytestmark = pytest.mark.usefixtures("cached_tracing")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid downloads, and run each test in a folder of its own."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise OSError("no network in tests")

    monkeypatch.setattr(torchvision_api, "load_state_dict_from_url", refuse)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


# --- render ---------------------------------------------------------------------------------------------------------


def test_render_writes_the_promised_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "b"
    assert cli.main(["render", *QUICK, "--filters", "2-3,11", "--out", str(out)]) == 0
    assert sorted(contents(out)) == [
        *("filter-0002.png", "filter-0003.png", "filter-0011.png", "grid.png", "result.safetensors", "run.json")
    ]
    assert (out / "gallery" / "index.html").is_file()
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("3 filters of block6.conv, mean score ")
    assert str(out) in printed.out
    summary = run_json(out)
    assert summary["config"]["model"] == "texturenet"
    assert [entry["filter"] for entry in summary["filters"]] == [2, 3, 11]
    assert np.asarray(PIL.Image.open(out / "filter-0003.png")).shape == (16, 16, 3)
    tensors = safetensors.torch.load_file(out / "result.safetensors")
    assert [entry["score"] for entry in summary["filters"]] == tensors["scores"].tolist()


def test_render_writes_to_the_default_folder() -> None:
    assert cli.main(["render", *QUICK, "--no-gallery"]) == 0
    assert "run.json" in contents(Path("featvis-out"))
    assert not Path("featvis-out/gallery").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:images of 12 x 20 are stretched:UserWarning")
def test_every_flag_reaches_render(tmp_path: Path, texturenet: Model) -> None:
    weights = tmp_path / "mine.safetensors"
    safetensors.torch.save_file(texturenet.module.state_dict(), weights)
    out = tmp_path / "out"
    flags = {
        "--layer": "block4.conv",
        "--filters": "5,1-3",
        "--steps": "2",
        "--size": "12x20",
        "--seed": "7",
        "--views": "lucid",
        "--image": "phase",
        "--optimizer": "adam",
        "--lr": "0.15",
        "--batch-size": "3",
        "--tolerance": "0.5",
        "--redirect": "1",
        "--smooth-pools": "yes",
        "--precision": "float32",
        "--compile": "no",
        "--bands": "2,1,0",
        "--device": "cpu",
        "--weights": str(weights),
        "--out": str(out),
    }
    words = ["--deterministic", "--saliency", "--no-gallery", *(word for pair in flags.items() for word in pair)]
    assert cli.main(["render", "texturenet", *words]) == 0
    summary = run_json(out)
    config = summary["config"]
    expected = {
        "layer": "block4.conv",
        "steps": 2,
        "size": [12, 20],
        "seed": 7,
        "transforms": "lucid",
        "image": "phase",
        "optimizer": "adam",
        "lr": 0.15,
        "batch_size": 3,
        "tolerance": 0.5,
        "redirect": 1,
        "smooth_pools": "yes",
        "precision": "float32",
        "compile": "no",
        "deterministic": True,
        "saliency": True,
        "snapshots": 0,
        "bands": [2, 1, 0],
        "device": "cpu",
    }
    assert set(expected) - {"layer"} == {name for name, option in OPTIONS.items() if option.recorded}
    assert {name: config[name] for name in expected} == expected
    assert config["weights"].startswith("mine.safetensors sha256:")
    assert [entry["filter"] for entry in summary["filters"]] == [5, 1, 2, 3]
    tensors = safetensors.torch.load_file(out / "result.safetensors")
    assert tensors["images"].shape == (4, 3, 12, 20)
    assert tensors["history"].shape == (2, 4)
    assert tensors["saliency"].shape == (4, 12, 20)
    options: dict[str, Any] = {"steps": 2, "size": (12, 20), "seed": 7, "transforms": "lucid", "lr": 0.15}
    options |= {"optimizer": "adam", "image": "phase", "redirect": 1, "batch_size": 3, "deterministic": True}
    expected_result = rendering.render(texturenet, "block4.conv", [5, 1, 2, 3], **options)
    assert torch.equal(tensors["images"], expected_result.images)
    # The command that the gallery shows for this run.json renders the same image.
    command = reproduce(config, config["layer"], 1, 7).command
    assert command is not None
    command = command.replace("mine.safetensors", str(weights))
    assert cli.main([*shlex.split(command)[1:], "--no-gallery", "--device", "cpu", "--out", str(tmp_path / "one")]) == 0
    again = run_json(tmp_path / "one")["config"]
    assert {name: again[name] for name in expected if name != "batch_size"} == {
        name: value for name, value in expected.items() if name != "batch_size"
    }
    image = safetensors.torch.load_file(tmp_path / "one" / "result.safetensors")["images"][0]
    torch.testing.assert_close(image, tensors["images"][1], rtol=1e-3, atol=1e-3)


def test_snapshots_are_animated_beside_the_images(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = ["render", *QUICK, "--steps", "4", "--no-gallery", "--out", str(out)]
    assert cli.main([*run, "--snapshots", "3"]) == 0
    assert sorted(contents(out)) == [
        *("filter-0000.png", "filter-0000.webp", "filter-0001.png", "filter-0001.webp"),
        *("grid.png", "result.safetensors", "run.json"),
    ]
    with PIL.Image.open(out / "filter-0001.webp") as animation:
        assert (getattr(animation, "n_frames", 1), animation.size) == (3, (16, 16))
    animated = safetensors.torch.load_file(out / "result.safetensors")
    assert animated["snapshots"].shape == (2, 3, 3, 16, 16)
    assert run_json(out)["config"]["snapshots"] == 3
    assert cli.main(run) == 0
    assert not list(out.glob("*.webp"))
    plain = safetensors.torch.load_file(out / "result.safetensors")
    assert {*animated} - {*plain} == {"snapshots"}
    assert all(torch.equal(plain[name], animated[name]) for name in plain)
    summary = run_json(out)
    assert "snapshots" not in summary
    assert summary["config"]["snapshots"] == 0


def test_equal_commands_write_equal_bytes(tmp_path: Path) -> None:
    run = ["render", *QUICK, "--steps", "3", "--no-gallery"]
    for name in ("first", "second"):
        assert cli.main([*run, "--batch-size", "1", "--out", str(tmp_path / name)]) == 0
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    assert cli.main([*run, "--seed", "1", "--out", str(tmp_path / "third")]) == 0
    assert contents(tmp_path / "third")["grid.png"] != contents(tmp_path / "first")["grid.png"]


@pytest.mark.slow
def test_all_filters_of_a_layer(tmp_path: Path) -> None:
    flags = [*QUICK, "--layer", "block1.conv", "--filters", "all", "--batch-size", "64", "--no-gallery"]
    assert cli.main(["render", *flags, "--out", str(tmp_path / "out")]) == 0
    names = [name for name in contents(tmp_path / "out") if name.startswith("filter-")]
    convolution = load_model("texturenet").module.get_submodule("block1.conv")
    assert isinstance(convolution, torch.nn.Conv2d)
    assert len(names) == convolution.out_channels


@pytest.mark.slow
def test_torchvision_model_with_random_weights(tmp_path: Path) -> None:
    flags = ["--layer", "3.squeeze", *QUICK, "--no-gallery", "--out", str(tmp_path / "out")]
    assert cli.main(["render", "torchvision:squeezenet1_1@none", *flags]) == 0
    assert run_json(tmp_path / "out")["config"]["layer"] == "features.3.squeeze"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("all", None),
        ("0", [0]),
        ("0-3", [0, 1, 2, 3]),
        ("5-5", [5]),
        ("7,0-2", [7, 0, 1, 2]),
        (" 1 , 3-4 ", [1, 3, 4]),
    ],
)
def test_filter_numbers(text: str, numbers: list[int] | None) -> None:
    assert cli.filter_numbers(text) == numbers


@pytest.mark.parametrize("text", ["", ",", "1,", "-1", "3-1", "1-", "a", "1.5", "1--3", "ALL", "1;2", "0x3", "²"])
def test_invalid_filter_numbers_raise(text: str) -> None:
    with pytest.raises(ValueError, match="must be numbers and ranges such as '0-7,12', or 'all'"):
        cli.filter_numbers(text)


# --- layers ---------------------------------------------------------------------------------------------------------


def test_layers_of_the_default_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layers"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    header, *lines = printed.out.splitlines()
    assert header.split() == ["layer", "type", "output", "filters"]
    names = [name for name, _ in load_model("texturenet").module.named_modules() if name]
    assert [line.split()[0] for line in lines] == names
    row = next(line for line in lines if line.startswith("block6.conv "))
    assert row.split()[1] == "Conv2d"
    assert row.split()[2] == row.split()[-1]
    assert " x " in row
    assert len({line.index(line.split()[1]) for line in [header, *lines]}) == 1, "the columns do not line up"


def test_layers_of_a_torchvision_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["layers", "torchvision:squeezenet1_1@none"]) == 0
    assert "features.3.squeeze" in capsys.readouterr().out


# --- errors ---------------------------------------------------------------------------------------------------------


def check_rejected(
    arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str], *, folder: Path | None = None
) -> None:
    """Assert that a command exits with code 2, prints one line with the message, and writes nothing."""
    before = sorted(folder.parent.rglob("*")) if folder else []
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("featvis: error: ")
    assert message in printed.err
    assert sorted(folder.parent.rglob("*")) == before if folder else True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18", "--layer", "layer1"], "unknown model 'resnet18'; did you mean 'torchvision:resnet18'?"),
        (["texturnet", "--layer", "head"], "did you mean 'texturenet'"),
        (["torchvision:resnet81", "--layer", "layer1"], "'resnet18'"),
        (["torchvision:resnet18@V9", "--layer", "layer1"], "it has IMAGENET1K_V1"),
        (["torchvision:resnet18", "--layer", "layer1"], "could not fetch the weights"),
        (["torchvision:resnet18@none"], "--layer or --objective is needed for torchvision:resnet18@none"),
        (["--layer", "conv"], "layer 'conv' is ambiguous; it could be 'block1.conv', 'block2.conv'"),
        (["--layer", "block9.conv"], "no layer 'block9.conv'; did you mean 'block"),
        (["--filters", "0-7,9999"], "layer 'block6.conv' has filters 0 to "),
        (["--filters", ""], "filters '' must be numbers and ranges"),
        (["--filters", "3-1"], "filters '3-1' must be numbers and ranges"),
        (["--weights", "absent.pth"], "no weights file 'absent.pth'"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--size", "0"], "image size must be "),
        (["--size", "12x0"], "image size must be "),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--tolerance", "-1"], "tolerance must be finite and at least 0, got -1.0"),
        (["--precision", "half"], "unknown precision 'half'; expected one of auto, float32, bfloat16"),
        (["--compile", "fast"], "unknown compile 'fast'; expected one of auto, yes, no, cudagraphs"),
        (["--seed", "-1"], "seed must be in [0, 2**64), got -1"),
        (["--lr", "0"], "learning rate must be finite and above 0, got 0.0"),
        (["--lr", "nan"], "learning rate must be finite and above 0, got nan"),
        (
            ["--views", "sideways"],
            "unknown transforms 'sideways'; expected one of default, small, published, lucid, maco, none",
        ),
        (["--transforms", "sideways"], "unknown transforms 'sideways'"),
        (["--image", "oil"], "unknown image 'oil'; expected one of fourier, pixel"),
        (["--optimizer", "downhill"], "unknown optimizer 'downhill'; expected one of default, activation, published"),
        (["--redirect", "-1"], "redirect must be at least 0, got -1"),
        (["--snapshots", "9"], "snapshots must be"),
        (["--bands", "0,1,3"], "bands has channel 3, but the channels are 0 to 2; got (0, 1, 3)"),
        (["--device", "abacus"], "no device 'abacus' on this machine"),
        (["--device", ""], "no device '' on this machine"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_rejected(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    (tmp_path / "new").mkdir()
    flags = [flag for pair in zip(QUICK[::2], QUICK[1::2], strict=True) if pair[0] not in arguments for flag in pair]
    check_rejected(["render", *flags, *arguments, "--out", str(out)], message, capsys, folder=out)


def test_layer_without_channels_is_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Unflatten(1, (2, 2)))
    monkeypatch.setattr("featvis_func.models.loading.by_name", lambda *_, **__: load_toy(module, size=8))
    arguments = ["render", "texturenet", "--layer", "1", *QUICK, "--out", str(tmp_path / "out")]
    check_rejected(
        arguments,
        "gives (2, 2, 6, 6) per image, whose first or last axis could be the channels",
        capsys,
        folder=tmp_path / "out",
    )


@pytest.mark.parametrize("command", ["render", "layers"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("half.safetensors", "cannot be read"), ("half.pth", "cannot be read"), ("other.pth", "not of this architecture")],
)
def test_bad_weights_are_rejected(
    command: str, name: str, message: str, tmp_path: Path, texturenet: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name == "other.pth":
        torch.save({"conv.weight": torch.zeros(3)}, path)
    else:
        save: Any = safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save
        save(texturenet.module.state_dict(), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out = [*QUICK, "--out", str(tmp_path / "out")] if command == "render" else []
    check_rejected([command, "texturenet", "--weights", str(path), *out], message, capsys, folder=tmp_path / "out")


@pytest.mark.parametrize("command", ["render", "layers"])
def test_unknown_model_is_rejected(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_rejected([command, "vgg"] + ["--layer", "a"] * (command == "render"), "unknown model 'vgg'", capsys)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_file_in_place_of_the_folder_is_rejected(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    out = tmp_path / place
    check_rejected(["render", *QUICK, "--out", str(out)], f"cannot write to the folder {str(out)!r}", capsys)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_folder_that_cannot_be_written_is_rejected_before_rendering(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise AssertionError("rendering has begun")

    monkeypatch.setattr(rendering, "render", fail)
    (tmp_path / "file").touch()
    check_rejected(["render", *QUICK, "--out", str(tmp_path / "file")], "cannot write to the folder", capsys)


@pytest.mark.parametrize(
    "arguments",
    [[], ["paint"], ["render", "--steps", "many"], ["render", "--size", "5x"], ["render", "--size", "x"], ["--wrong"]],
    ids=" ".join,
)
def test_usage_errors_exit_with_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert not Path("featvis-out").exists()


def test_error_removes_only_new_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    check_rejected(["render", *QUICK, "--steps", "0", "--out", str(tmp_path / "mine")], "steps", capsys)
    assert (tmp_path / "mine").is_dir()
    check_rejected(["render", *QUICK, "--steps", "0", "--out", str(tmp_path / "mine" / "a" / "b")], "steps", capsys)
    assert list((tmp_path / "mine").iterdir()) == []


# --- any number of channels -----------------------------------------------------------------------------------------


@pytest.fixture
def six_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 6 channels in place of TextureNet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Conv2d(6, 4, 3), torch.nn.ReLU()).eval()
    model = load_model(module, size=16, mean=[0.0] * 6, std=[1.0] * 6)
    monkeypatch.setattr("featvis_func.models.load_model", lambda *_, **__: model)


@pytest.mark.usefixtures("six_channels")
def test_bands_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render = ["render", *QUICK, "--layer", "0", "--out", str(tmp_path / "a")]
    assert cli.main(render) == 0
    assert "; pictures show channels 0, 1, 2 of 6 as red, green, blue; gallery: " in capsys.readouterr().out
    assert cli.main([*render, "--bands", "3,2,1"]) == 0
    assert "pictures show" not in capsys.readouterr().out
    assert run_json(tmp_path / "a")["config"]["bands"] == [3, 2, 1]
    images = safetensors.torch.load_file(tmp_path / "a" / "result.safetensors")["images"]
    assert images.shape == (2, 6, 16, 16)
    shown = np.asarray(PIL.Image.open(tmp_path / "a" / "filter-0001.png"))
    np.testing.assert_array_equal(shown, (images[1, [3, 2, 1]] * 255).round().permute(1, 2, 0).numpy())
    page = tmp_path / "a" / "gallery" / "layers" / "0" / "1.html"
    assert "channels 3, 2, 1 of 6 as red, green, blue" in page.read_text()
    assert "bands=(3, 2, 1)" in page.read_text()
    assert cli.main(["gallery", str(tmp_path / "a"), "--bands", "5"]) == 0
    assert "channel 5 of 6" in page.read_text()
    sweep = ["sweep", "--layers", "0", "--filters", "0", "--steps", "1", "--device", "cpu", "--bands", "3,2,1"]
    assert cli.main([*sweep, "--out", str(tmp_path / "b")]) == 0
    assert run_json(tmp_path / "b")["config"]["render"]["bands"] == [3, 2, 1]


@pytest.mark.parametrize("command", ["render", "gallery"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3;2;1", "'3;2;1' are not bands; expected 1 or 3 channel numbers, such as 3,2,1"),
        ("3,2,", "'3,2,' are not bands"),
        ("-1", "'-1' are not bands"),
        ("1,2", "bands must be 1 channel (grey) or 3 (red, green, blue), got (1, 2)"),
    ],
)
def test_words_that_are_no_bands_are_rejected(
    command: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, *(["folder"] if command == "gallery" else []), "--bands", text])
    assert message in " ".join(capsys.readouterr().err.split())


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name"), [(renderer, "run_batched"), (resolve, "make_features"), (renderer, "make_result")]
)
def test_interrupted_run_leaves_no_files(
    module: Any, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, interrupt)
    assert cli.main(["render", *QUICK, "--out", str(tmp_path / "a" / "b")]) == 130
    printed = capsys.readouterr()
    assert printed.err.strip() == "featvis: interrupted; nothing unfinished was written"
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_interrupted_save_leaves_complete_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["render", *QUICK, "--no-gallery", "--out", str(tmp_path / "out")]
    real, calls = os.replace, []

    def interrupt(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        assert cli.main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    left = contents(tmp_path / "out")
    assert sorted(left) == ["filter-0000.png", "grid.png"]
    assert cli.main([*arguments[:-1], str(tmp_path / "complete")]) == 0
    complete = contents(tmp_path / "complete")
    assert left == {name: complete[name] for name in left}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_sigint_ends_a_process(tmp_path: Path) -> None:
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job\n"
        "from featvis_func.cli import main as cli\nfrom featvis_func.engine import batching\n"
        "real = batching.run\n"
        "def run(*args, callback, **options):\n"
        "    def report(info):\n"
        "        print('begun', flush=True)\n"
        "        callback(info)\n"
        "    return real(*args, callback=report, **options)\n"
        "batching.run = run\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["render", *QUICK, "--steps", "100000", "--out", str(tmp_path / "a" / "out")]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip() == "featvis: interrupted; nothing unfinished was written"
    assert not (tmp_path / "a").exists()


# --- help -----------------------------------------------------------------------------------------------------------


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["render", "--help"], ["layers", "--help"], ["--version"]], ids=str)
def test_help_does_not_import_torch(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from featvis_func.cli import main as cli\n"
        "try:\n"
        f"    cli.main({arguments!r})\n"
        "except SystemExit as end:\n"
        "    heavy = sorted({'torch', 'torchvision', 'numpy', 'safetensors', 'PIL'} & set(sys.modules))\n"
        "    sys.exit(str(heavy) if end.code or heavy else 0)\n"
    )
    done = python("-c", script)
    assert (done.returncode, done.stderr) == (0, "")
    assert "featvis" in done.stdout


def test_help_names_every_flag_and_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["render", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    flags = ["--layer", "--filters", "--weights", "--out", "--no-gallery", *map(flag_of, OPTIONS)]
    assert [flag for flag in flags if flag not in printed] == []
    for names in (TRANSFORMS, IMAGES, OPTIMIZERS):
        assert f": {', '.join(names)}" in printed.replace("- ", "-")


@pytest.mark.slow
def test_package_can_be_run_as_a_module(tmp_path: Path) -> None:
    done = python("-m", "featvis_func", "render", *QUICK, "--no-gallery", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 filters of block6.conv" in done.stdout
    failed = python("-m", "featvis_func", "render", *QUICK, "--steps", "0", "--out", str(tmp_path / "none"))
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert not (tmp_path / "none").exists()
