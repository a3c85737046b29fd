"""Tests of unusual input to sweeps: relative paths, missing devices, special names, damaged units, numpy types."""

import os
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import featvis_func as fv
from featvis_func.models import fingerprint
from featvis_func.sweep import dry_run, open_store, sweep, validate
from featvis_func.sweep.plan import plan_layers
from tests.toys import load_toy

QUICK: dict[str, Any] = {"steps": 1, "size": 8}
pytestmark = pytest.mark.usefixtures("cached_tracing", "one_thread")


def model(**layers: nn.Module) -> fv.Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = layers or {"c1": nn.Conv2d(3, 4, 3), "c2": nn.Conv2d(4, 4, 3)}
    return load_toy(nn.Sequential(OrderedDict(modules)), size=8)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.tensor(1.0)
        self.unsaved: Tensor
        self.register_buffer("unsaved", torch.tensor(1.0), persistent=False)


def test_relative_output_folder_is_resolved_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = model()
    assert sweep(net, "c1", out="here", **QUICK).complete
    store = open_store("here")
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    assert store["c1", 0].image.shape == (3, 8, 8)
    assert store.path == tmp_path / "here"


def test_unit_size_below_batch_size_reduces_the_batch_size() -> None:
    (plan,) = plan_layers(model(), "c1", batch_size=4, unit_size=2)
    assert (plan.batch_size, plan.unit_size) == (2, 2)


def test_fingerprint_includes_plain_tensors_and_nonpersistent_buffers() -> None:
    net = Scaled()
    before = fingerprint(net)
    assert fingerprint(net) == before
    net.plain = torch.tensor(2.0)
    other = fingerprint(net)
    net.unsaved.fill_(2.0)
    assert len({before, other, fingerprint(net)}) == 3


def test_missing_device_is_rejected_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no device 'gpu' on this machine"):
        sweep(model(), "c1", out=tmp_path / "out", device="gpu", **QUICK)
    assert not (tmp_path / "out").exists()


def test_layer_names_with_colon_or_brackets_are_taken_literally(tmp_path: Path) -> None:
    net = model(**{"conv:1": nn.Conv2d(3, 2, 3), "a[0]": nn.Conv2d(2, 2, 3)})
    assert sweep(net, ["conv:1", "a[0]"], out=tmp_path, **QUICK).complete
    assert open_store(tmp_path).layers == ("conv:1", "a[0]")


def test_store_skips_a_damaged_unit_with_a_warning(tmp_path: Path) -> None:
    sweep(model(), "c1", out=tmp_path, unit_size=2, **QUICK)
    shard = sorted(tmp_path.rglob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    store = open_store(tmp_path)
    with pytest.warns(UserWarning, match="unit 'c1/00000-00001' is left out: .* is damaged.*; run the sweep again"):
        assert store.filters("c1") == (2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [entry.filter for entry in store] == [2, 3]
        assert len(store) == 2
        assert store.layer("c1").filters == (2, 3)
    assert list(validate(tmp_path).status.damaged) == ["c1/00000-00001"]


@pytest.mark.parametrize(
    ("which", "says"), [("c1", "expected a layer and a filter number"), (("c1", 9), "no filter 9")]
)
def test_store_rejects_invalid_keys_and_takes_any_integer_type(tmp_path: Path, which: Any, says: str) -> None:
    sweep(model(), "c1", out=tmp_path, **QUICK)
    store = open_store(tmp_path)
    assert store["c1", torch.tensor(2)].filter == store["c1", np.int64(2)].filter == 2  # type: ignore[index]
    with pytest.raises(ValueError, match=says):
        store[which]


def test_numpy_sizes_are_accepted_and_custom_objects_and_files_rejected(tmp_path: Path) -> None:
    assert sweep(model(), "c1", out=tmp_path / "a", steps=1, size=(np.int64(8), np.int64(9))).complete  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a sweep takes optimizer by name, not an object"):
        sweep(model(), "c1", out=tmp_path / "b", optimizer=fv.default_optimizer(3), **QUICK)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; a sweep needs a folder"):
        sweep(model(), "c1", out=tmp_path / "file", **QUICK)
    with pytest.raises(ValueError, match="is not the folder of a sweep"):
        open_store(tmp_path / "file")


def test_number_of_snapshots_is_part_of_the_configuration(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 3, "size": 8, "unit_size": 2}
    sweep(model(), "c1", out=tmp_path / "plain", **options)
    config = open_store(tmp_path / "plain").config
    assert set(config["render"]) == {
        *("steps", "size", "seed", "transforms", "lr", "image", "optimizer", "tolerance", "redirect", "precision"),
        *("compile", "deterministic", "snapshots", "bands", "smooth_pools"),
    }
    net = model()
    for count in (None, 0):
        assert sweep(net, "c1", out=tmp_path / "none", **dict(options, snapshots=count)).complete
    with pytest.raises(ValueError, match=r"render\.snapshots: 0 in the folder, 3 requested"):
        sweep(net, "c1", out=tmp_path / "none", **dict(options, snapshots=3))
    assert open_store(tmp_path / "none").config["render"]["snapshots"] == 0


def test_sweep_with_snapshots_can_be_resumed(tmp_path: Path) -> None:
    net = model()
    options: dict[str, Any] = {"steps": 4, "size": 8, "unit_size": 2, "snapshots": 3}
    assert sweep(net, "c1", out=tmp_path, **options).complete
    shards = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    sidecar = max(tmp_path.rglob("c1/*.json"))
    sidecar.unlink()
    max(shards).unlink()
    assert open_store(tmp_path).filters("c1") == (0, 1)
    assert sweep(net, "c1", out=tmp_path, **options).complete
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == shards
    assert validate(tmp_path).sound
    store = open_store(tmp_path)
    assert store.config["render"]["snapshots"] == 3
    expected = fv.render(net, "c1", steps=4, size=8, batch_size=2, snapshots=3)
    stored = store.layer("c1").snapshots
    assert expected.snapshots is not None
    assert stored is not None
    assert torch.equal(stored, expected.snapshots)
    with pytest.raises(ValueError, match=r"render\.snapshots: 3 in the folder, 2 requested"):
        sweep(net, "c1", out=tmp_path, **dict(options, snapshots=2))


def test_dry_run_includes_the_bytes_of_snapshots() -> None:
    def estimated(**options: Any) -> int:
        return dry_run(model(), "c1", steps=4, size=8, **options).estimate.bytes

    assert estimated(snapshots=5) - estimated() == 4 * 5 * 3 * 8 * 8
    assert estimated(snapshots=5, image="alpha") - estimated(image="alpha") == 4 * 5 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("count", "says"),
    [
        (-1, "snapshots must be at least 0"),
        (7, r"snapshots must be in \[0, 2\] for steps=1, got 7"),
    ],
)
def test_invalid_snapshots_are_rejected_before_anything_is_written(tmp_path: Path, count: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sweep(model(), "c1", out=tmp_path / "out", snapshots=count, **QUICK)
    assert not (tmp_path / "out").exists()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_brackets_that_select_an_output_are_not_a_pattern() -> None:
    model = load_toy(nn.Sequential(OrderedDict(two=Pair())).eval(), size=12)
    for name in ("two[1]", "two[1]@chw"):
        assert [(plan.layer, len(plan.filters)) for plan in plan_layers(model, name)] == [(name, 5)]
    assert [plan.layer for plan in plan_layers(model, "two.[fs]*")] == ["two.first", "two.second"]
    with pytest.raises(ValueError, match=r"no layer of Sequential fits the pattern 'tow\[1\]'"):
        plan_layers(model, "tow[1]")
