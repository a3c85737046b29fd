"""Matrices of directions in plain files, their checks, and the names of their members."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from featvis_func.io.dictionary import read_dictionary, read_names

N, D = 10, 6


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (N, D)), generator=torch.Generator().manual_seed(seed))


def write_safetensors(path: Path, value: Tensor) -> Path:
    safetensors.torch.save_file({"atoms": value}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def write_npy(path: Path, value: Tensor) -> Path:
    np.save(path.with_suffix(".npy"), value.numpy())
    return path.with_suffix(".npy")


def write_pt(path: Path, value: Any) -> Path:
    torch.save(value, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def write_pth(path: Path, value: Tensor) -> Path:
    torch.save({"state_dict": {"module.atoms": value}}, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


WRITERS = [write_safetensors, write_npy, write_pt, write_pth]


@pytest.mark.parametrize("write", WRITERS)
def test_rows_are_members(write: Callable[[Path, Tensor], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "atoms", matrix())
    dictionary = read_dictionary(path, width=D)
    assert torch.equal(dictionary.directions, matrix())
    assert dictionary.directions.dtype == torch.float32
    assert (dictionary.encoder, dictionary.center, dictionary.threshold) == (None, None, None)
    assert (dictionary.activation, dictionary.k, dictionary.names) == ("none", None, None)
    assert dictionary.format == {".safetensors": "safetensors", ".npy": "npy"}.get(path.suffix, "torch")
    name = {".safetensors": ":atoms", ".pth": ":atoms"}.get(path.suffix, "")
    assert dictionary.source == f"{path}{name}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_precisions_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    dictionary = read_dictionary(write_safetensors(tmp_path / "atoms", matrix().to(dtype)))
    assert dictionary.directions.dtype == torch.float32
    assert torch.equal(dictionary.directions, matrix().to(dtype).float())


@pytest.mark.parametrize("dtype", [">f4", "<f8", "<f2", np.longdouble])
def test_arrays_of_any_byte_order_and_precision(dtype: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "atoms.npy", np.asfortranarray(matrix().numpy().astype(dtype)))
    assert torch.allclose(read_dictionary(tmp_path / "atoms.npy").directions, matrix(), atol=1e-2)


def test_one_axis_is_one_direction(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "axis", matrix(D))
    assert torch.equal(read_dictionary(path, width=D).directions, matrix(D)[None])


def test_a_tensor_is_chosen_by_name_or_because_it_is_the_only_matrix(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "probe", {"head": {"weight": matrix(), "bias": matrix(N)}, "epoch": 3})
    assert read_dictionary(path, width=D).source == f"{path}:head.weight"
    assert torch.equal(read_dictionary(path, "head.bias").directions, matrix(N)[None])


def test_the_tensors_share_no_memory_with_the_file(tmp_path: Path) -> None:
    """A file mapped into memory would change the directions when it is written anew."""
    path = write_safetensors(tmp_path / "atoms", matrix())
    dictionary = read_dictionary(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(dictionary.directions, matrix())


def test_dead_members_are_read(tmp_path: Path) -> None:
    dead = matrix()
    dead[[2, 5]] = 0
    assert torch.equal(read_dictionary(write_pt(tmp_path / "atoms", dead)).directions, dead)


def test_a_folder_of_one_file_is_that_file(tmp_path: Path) -> None:
    write_npy(tmp_path / "atoms", matrix())
    assert read_dictionary(tmp_path).source == str(tmp_path)


def refused(message: str) -> Any:
    return pytest.raises(ValueError, match=re.escape(message))


def test_the_orientation_is_checked(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "atoms", matrix().T.contiguous())
    with refused(
        "(6, 10), 6 directions of 10 numbers, but layer 'mlp' has 6 channels: expected (n, 6); its members are"
    ):
        read_dictionary(path, width=D, layer="mlp")
    with refused("(6, 10), 6 directions of 10 numbers, but the layer has 7 channels: expected (n, 7)") as error:
        read_dictionary(path, width=7)
    assert "its members are columns" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(N, D, dtype=torch.int64), "must be dense floating-point numbers, got torch.int64"),
        (torch.ones(N, D, dtype=torch.bool), "must be dense floating-point numbers, got torch.bool"),
        (torch.ones(N, D, dtype=torch.complex64), "must be dense floating-point numbers, got torch.complex64"),
        (torch.ones(0, D), "must be a matrix (n, d) of directions, got (0, 6)"),
        (torch.ones(N, 0), "must be a matrix (n, d) of directions, got (10, 0)"),
        (torch.ones(2, N, D), "must be a matrix (n, d) of directions, got (2, 10, 6)"),
        (torch.tensor(1.0), "must be a matrix (n, d) of directions, got ()"),
        (torch.zeros(N, D), "has only zeros in all of its 10 rows"),
        (
            torch.ones(N, D).index_fill(0, torch.tensor([3, 7]), torch.nan),
            "in 2 of 10 rows, the first of which is row 3",
        ),
        (torch.ones(N, D).index_fill(0, torch.tensor([9]), torch.inf), "in 1 of 10 rows, the first of which is row 9"),
        (torch.full((N, D), 1e300, dtype=torch.float64), "NaN or infinite numbers in 10 of 10 rows"),
    ],
)
@pytest.mark.parametrize("write", WRITERS)
def test_matrices_that_are_refused(
    write: Callable[[Path, Tensor], Path], value: Tensor, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "atoms", value)
    with refused(message) as error:
        read_dictionary(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    with refused("torch.sparse_coo"):
        read_dictionary(write_pt(tmp_path / "atoms", matrix().to_sparse()))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "atoms", {"decoder": matrix(), "encoder": matrix()})
    with refused("there is no tensor 'decodr'; expected one of decoder, encoder; did you mean 'decoder'"):
        read_dictionary(path, "decodr")
    with refused("name one with tensor=: decoder (10, 6), encoder (10, 6)"):
        read_dictionary(path)
    with refused("there is no tensor 'atoms'; its only tensor has no name"):
        read_dictionary(write_npy(tmp_path / "atoms", matrix()), "atoms")


def test_missing_files_and_other_suffixes(tmp_path: Path) -> None:
    with refused(f"no dictionary '{tmp_path}/none.npy': expected a file, or a folder with one"):
        read_dictionary(tmp_path / "none.npy")
    with refused("must hold one .safetensors, .npy, .pt, .pth file or sae_weights.safetensors, has none"):
        read_dictionary(tmp_path)
    for name in ("a", "b"):
        write_npy(tmp_path / name, matrix())
    with refused("has several: a.npy, b.npy; give the path of one"):
        read_dictionary(tmp_path)
    (tmp_path / "c.npz").touch()
    with refused("must be a .safetensors, .npy, .pt or .pth file"):
        read_dictionary(tmp_path / "c.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pt", ".pth"])
@pytest.mark.parametrize("data", [b"", b"damaged", b"{not JSON\n", b"\x80\x02damaged"])
def test_damaged_files(suffix: str, data: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"atoms{suffix}"
    path.write_bytes(data)
    with refused(f"dictionary '{path}' cannot be read: ") as error:
        read_dictionary(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", WRITERS)
def test_files_that_end_early(write: Callable[[Path, Tensor], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "atoms", matrix())
    path.write_bytes(path.read_bytes()[:-40])
    with refused(f"dictionary '{path}' cannot be read: "):
        read_dictionary(path)


class Probe(nn.Linear):
    """A module that is not one of torch's own."""


class Malicious:
    def __reduce__(self) -> Any:
        return print, ("code was run",)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_is_run(zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "atoms.pt"
    torch.save({"atoms": matrix(), "more": Malicious()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"is a pickle that needs code \((builtins\.)?print\), which is never run"):
        read_dictionary(path)
    torch.save(Probe(D, N), path)
    with refused(f"is a pickle that needs code ({__name__}.Probe), which is never run; save a state dict or the"):
        read_dictionary(path)
    np.save(tmp_path / "atoms.npy", np.array([Malicious()]), allow_pickle=True)
    with refused("atoms.npy' cannot be read: Object arrays cannot be loaded when allow_pickle=False"):
        read_dictionary(tmp_path / "atoms.npy")
    path.write_bytes(pickle.dumps(Malicious()))
    with refused("atoms.pt"):
        read_dictionary(path)
    assert capsys.readouterr().out == ""


def test_files_without_tensors(tmp_path: Path) -> None:
    with refused("holds no tensors"):
        read_dictionary(write_pt(tmp_path / "atoms", {"epoch": 3}))


def test_modules_of_torch_are_read_as_data(tmp_path: Path) -> None:
    probe = nn.Linear(D, N)
    path = write_pt(tmp_path / "probe", probe)
    assert torch.equal(read_dictionary(path, width=D).directions, probe.weight)


@pytest.mark.parametrize("name", ["names.txt", "names.json", "atoms.names.txt", "atoms.names.json"])
def test_names_lie_beside_the_file(name: str, tmp_path: Path) -> None:
    path = write_npy(tmp_path / "atoms", matrix(3, D))
    names = ["dog", "", "Zürich"]
    text = json.dumps(names) if name.endswith(".json") else "\n".join(names) + "\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_dictionary(path).names == ("dog", "", "Zürich")
    (tmp_path / name).write_text(json.dumps(names[:2]) if name.endswith(".json") else "dog\ncat\n", encoding="utf-8")
    with refused("has 2 names, but the dictionary has 3 members"):
        read_dictionary(path)


def test_the_names_of_the_file_come_first(tmp_path: Path) -> None:
    path = write_npy(tmp_path / "atoms", matrix(1, D))
    (tmp_path / "names.txt").write_text("wrong\nnumber\n")
    (tmp_path / "atoms.names.json").write_text('{"0": "right"}')
    assert read_dictionary(path).names == ("right",)


def test_names_by_number(tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text('{"12": "dog", "1": "cat"}')
    assert read_names(path, 20) == tuple({12: "dog", 1: "cat"}.get(i, "") for i in range(20))
    assert len(read_names(path)) == 13
    with refused("names member 12, but the dictionary has 12 members"):
        read_names(path, 12)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.csv", "dog", "must be a .txt or .json file"),
        ("names.json", "{", "cannot be read: Expecting property name"),
        ("names.json", "3", "must be a list of names, or an object of names by number"),
        ("names.json", "[1, 2]", "must be a list of names, or an object of names by number"),
        ("names.json", '{"0": 1}', "must be a list of names, or an object of names by number"),
        ("names.json", '{"dog": "0"}', "must be numbered from 0, got 'dog'"),
        ("names.json", '{"-1": "dog"}', "must be numbered from 0, got '-1'"),
    ],
)
def test_names_that_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with refused(message):
        read_names(tmp_path / name)


def test_files_of_names_that_are_missing_or_no_text(tmp_path: Path) -> None:
    with refused("no file of names"):
        read_names(tmp_path / "names.txt")
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    with refused("cannot be read: 'utf-8' codec can't decode"):
        read_names(tmp_path / "names.txt")


@pytest.mark.parametrize("width", [0, 2.5])
def test_a_width_is_a_whole_number(width: Any, tmp_path: Path) -> None:
    path = write_npy(tmp_path / "atoms", matrix())
    with refused("width must be"):
        read_dictionary(path, width=width)
