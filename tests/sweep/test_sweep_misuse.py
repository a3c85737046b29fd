"""Sweeps as they are used without care: working directories, devices, models and stores that are not what they seem."""

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

QUICK: dict[str, Any] = {"steps": 1, "size": 8}


def model(**layers: nn.Module) -> fv.Model:
    names = layers or {"c1": nn.Conv2d(3, 4, 3), "c2": nn.Conv2d(4, 4, 3)}
    return fv.load_model(nn.Sequential(OrderedDict(names)), size=8)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.tensor(1.0)
        self.unsaved: Tensor
        self.register_buffer("unsaved", torch.tensor(1.0), persistent=False)


def test_a_relative_folder_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    net = model()
    assert sweep(net, "c1", out="here", **QUICK).complete
    store = open_store("here")
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    assert store["c1", 0].image.shape == (3, 8, 8)
    assert store.path == tmp_path / "here"


def test_units_smaller_than_a_batch_are_rendered_in_smaller_batches() -> None:
    (plan,) = plan_layers(model(), "c1", batch_size=4, unit_size=2)
    assert (plan.batch_size, plan.unit_size) == (2, 2)


def test_every_tensor_of_a_module_counts() -> None:
    net = Scaled()
    before = fingerprint(net)
    assert fingerprint(net) == before
    net.plain = torch.tensor(2.0)
    other = fingerprint(net)
    net.unsaved.fill_(2.0)
    assert len({before, other, fingerprint(net)}) == 3


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no device 'gpu' here"):
        sweep(model(), "c1", out=tmp_path / "out", device="gpu", **QUICK)
    assert not (tmp_path / "out").exists()


def test_names_that_mean_something_else_elsewhere(tmp_path: Path) -> None:
    net = model(**{"conv:1": nn.Conv2d(3, 2, 3), "a[0]": nn.Conv2d(2, 2, 3)})
    assert sweep(net, ["conv:1", "a[0]"], out=tmp_path, **QUICK).complete
    assert open_store(tmp_path).layers == ("conv:1", "a[0]")


def test_one_damaged_unit_does_not_hide_the_others(tmp_path: Path) -> None:
    sweep(model(), "c1", out=tmp_path, unit_size=2, **QUICK)
    shard = sorted(tmp_path.rglob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    store = open_store(tmp_path)
    with pytest.warns(UserWarning, match="left out: .* is damaged"):
        assert store.filters("c1") == (2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert [entry.filter for entry in store] == [2, 3]
        assert len(store) == 2
        assert store.layer("c1").filters == (2, 3)
    assert list(validate(tmp_path).status.damaged) == ["c1/00000-00001"]


@pytest.mark.parametrize(
    ("which", "says"), [("c1", "expected a layer and the number of a filter"), (("c1", 9), "no filter 9")]
)
def test_what_a_store_cannot_be_asked(tmp_path: Path, which: Any, says: str) -> None:
    sweep(model(), "c1", out=tmp_path, **QUICK)
    store = open_store(tmp_path)
    assert store["c1", torch.tensor(2)].filter == store["c1", np.int64(2)].filter == 2  # type: ignore[index]
    with pytest.raises(ValueError, match=says):
        store[which]


def test_sizes_of_numpy_and_parts_of_ones_own(tmp_path: Path) -> None:
    assert sweep(model(), "c1", out=tmp_path / "a", steps=1, size=(np.int64(8), np.int64(9))).complete  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a sweep takes optimizer by name, one of default, published"):
        sweep(model(), "c1", out=tmp_path / "b", optimizer=fv.default_optimizer(3), **QUICK)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; a sweep needs a folder"):
        sweep(model(), "c1", out=tmp_path / "file", **QUICK)
    with pytest.raises(ValueError, match="is not the folder of a sweep"):
        open_store(tmp_path / "file")


def test_snapshots_belong_to_the_configuration_only_where_there_are_any(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 3, "size": 8, "unit_size": 2}
    sweep(model(), "c1", out=tmp_path / "plain", **options)
    config = open_store(tmp_path / "plain").config
    assert set(config["render"]) == {  # as ever: folders from before there were snapshots go on
        *("steps", "size", "seed", "views", "lr", "image", "optimizer", "tolerance", "redirect", "precision"),
        *("compile", "deterministic"),
    }
    torch.manual_seed(0)
    net = model()
    for count in (None, 0):
        assert sweep(net, "c1", out=tmp_path / "none", **dict(options, snapshots=count)).complete
    with pytest.raises(ValueError, match=r"render\.snapshots: null there, 3 asked for"):
        sweep(net, "c1", out=tmp_path / "none", **dict(options, snapshots=3))
    assert "snapshots" not in open_store(tmp_path / "none").config["render"]


def test_a_sweep_with_snapshots_goes_on_where_it_was(tmp_path: Path) -> None:
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
    found = store.layer("c1").snapshots
    assert expected.snapshots is not None
    assert found is not None
    assert torch.equal(found, expected.snapshots)
    with pytest.raises(ValueError, match=r"render\.snapshots: 3 there, 2 asked for"):
        sweep(net, "c1", out=tmp_path, **dict(options, snapshots=2))


def test_the_bytes_of_snapshots_are_told_beforehand() -> None:
    def told(**options: Any) -> int:
        return dry_run(model(), "c1", steps=4, size=8, **options).estimate.bytes

    assert told(snapshots=5) - told() == 4 * 5 * 3 * 8 * 8
    assert told(snapshots=5, image="alpha") - told(image="alpha") == 4 * 5 * 4 * 8 * 8


@pytest.mark.parametrize(
    ("count", "says"),
    [(-1, "snapshots must be at least 0"), (7, "snapshots must be 0 to 2, as 1 steps have so many images, got 7")],
)
def test_snapshots_that_cannot_be_are_refused_before_anything_is_written(tmp_path: Path, count: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sweep(model(), "c1", out=tmp_path / "out", snapshots=count, **QUICK)
    assert not (tmp_path / "out").exists()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 5, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_one_of_several_outputs_is_no_pattern() -> None:
    model = fv.load_model(nn.Sequential(OrderedDict(two=Pair())).eval(), size=12)
    for name in ("two[1]", "two[1]@chw"):
        assert [(plan.layer, len(plan.filters)) for plan in plan_layers(model, name)] == [(name, 5)]
    assert [plan.layer for plan in plan_layers(model, "two.[fs]*")] == ["two.first", "two.second"]
    with pytest.raises(ValueError, match=r"no layer of Sequential fits the pattern 'tow\[1\]'"):
        plan_layers(model, "tow[1]")
