"""The benchmarks of transfer and retention, on small models and few steps."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import featvis_func as fv
from benchmarks import retention, transfer
from featvis_func.image import fourier
from featvis_func.models import Model


class Bright(nn.Module):
    """Class ``i`` is channel ``i``'s mean brightness."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(images).flatten(1)


def plain(module: nn.Module, size: int) -> Model:
    return fv.load_model(module.eval(), size=size, mean=[0.0] * 3, std=[1.0] * 3)


class Scaled(Bright):
    """The same with a parameter, which tells the device."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.scale


def test_judge_ranks_the_class_of_each_image() -> None:
    """The red image's own class is first, and third for the class of blue; green is resized first."""
    images = torch.zeros(3, 3, 8, 8)
    images[:, 0], images[:, 1] = 1.0, 0.5
    found = transfer.judge(plain(Scaled(), 6), images, [0, 1, 2])
    assert found.rank.tolist() == [0, 1, 2]
    expected = torch.tensor([4.0, 2.0, 0.0]).log_softmax(0)
    torch.testing.assert_close(found.log_probability, expected)


def test_bootstrap_covers_the_mean_and_narrows() -> None:
    few, many = (torch.arange(n) % 2 for n in (20, 2000))
    (low, high), (lower, upper) = transfer.bootstrap(few), transfer.bootstrap(many)
    assert low < 0.5 < high
    assert 0.2 < high - low < 0.5  # 2 * 1.96 * 0.5 / sqrt(20) = 0.44
    assert 0.03 < upper - lower < 0.06
    assert transfer.bootstrap(few) == (low, high)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("size", [(64, 64), (48, 75)])
def test_spectrum_finds_the_exponent_of_a_power_law(decay: float, size: tuple[int, int]) -> None:
    image = fourier(size, channels=1, sd=0.1, decay=decay)
    images = torch.stack([image.decode(image.init(torch.tensor([0, i]))) for i in range(20)])
    grain, exponent = transfer.spectrum(images)
    assert exponent == pytest.approx(2 * decay, abs=0.15)
    if decay == 0:  # the disc of half the Nyquist frequency has pi / 16 of all frequencies
        assert grain == pytest.approx(1 - torch.pi / 16, abs=0.02)
    else:
        assert grain < 0.35


@pytest.mark.slow
def test_rows_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texturenet: Model) -> None:
    """Two rows, one of them the published script; a second run measures only what is missing."""
    made: list[str] = []
    network = transfer.Network("one", "texturenet", "", "head")
    monkeypatch.setattr(transfer, "RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.common.RESULTS", tmp_path)
    monkeypatch.setattr(transfer, "NETWORKS", (network, network._replace(name="two")))
    monkeypatch.setattr(transfer, "METHODS", {"quick": {"steps": 2, "size": 32}, "published script": None})
    monkeypatch.setattr(transfer, "CLASSES", range(20))
    monkeypatch.setattr(transfer, "SCRIPT_STEPS", 1)
    monkeypatch.setattr(transfer, "load", lambda network, device: texturenet)
    measure = transfer.measure

    def counted(maker: tuple[transfer.Network, Model], judging: Model, method: str, *more: object) -> object:
        made.append(f"{maker[0].name} {method}")
        return measure(maker, judging, method, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "measure", counted)
    transfer.main("cpu", 1)
    assert made == ["one quick", "two quick", "one published script", "two published script"]
    path = tmp_path / "transfer-cpu.json"
    rows = json.loads(path.read_text())["rows"]
    # Both networks are the same one, so that the judge agrees with the maker.
    assert all(row["top1"] == row["own_top1"] for row in rows)
    assert all(row["top1_low"] <= row["top1"] <= row["top1_high"] and row["seconds"] > 0 for row in rows)
    assert len(list(tmp_path.glob("*.webp"))) == 4
    path.write_text(json.dumps({"rows": rows[:3]}))
    transfer.main("cpu", 1)
    assert made[4:] == ["two published script"]


def test_retention_of_what_damages_do_not_change(texturenet: Model) -> None:
    """Flat images of sixteenths survive all four damages, noise of single pixels does not survive a blur."""
    flat = (torch.arange(4)[:, None, None, None] / 15 + 4 / 15).expand(4, 3, 96, 96)
    damaged = {name: damage(flat) for name, damage in retention.damages().items()}
    for name, images in damaged.items():
        torch.testing.assert_close(images, flat, rtol=0, atol=0.01 if name == "jpeg" else 1e-5)
    noise = torch.rand(4, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    for name in ("blur", "half"):
        assert retention.damages()[name](noise).std() < 0.6 * noise.std()
    row = retention.retention(texturenet, "block1.conv", "noise", noise, (0, 1, 2, 3))
    assert row.activation > 0
    assert abs(row.four_bits - 1) < abs(row.blur - 1)


def test_retention_counts_dead_images(texturenet: Model) -> None:
    class Off(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)
            nn.init.zeros_(self.conv.weight)
            nn.init.constant_(self.conv.bias, -1.0)  # type: ignore[arg-type]

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images)

    row = retention.retention(plain(Off(), 16), "conv", "noise", torch.rand(2, 3, 16, 16), (0, 1))
    assert (row.dead, row.mean) == (2, 0.0)


def test_photographs_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texturenet: Model) -> None:
    retention.contact_sheet(torch.rand(2, 3, 90, 150), rows=1).save(tmp_path / "a.png")
    monkeypatch.setenv("FEATVIS_PHOTOGRAPHS", str(tmp_path))
    crops = retention.photographs(96)
    assert crops is not None
    assert crops.shape == (retention.CROPS, 3, 96, 96)
    best = retention.best_photographs(texturenet, "block4.conv", (0, 1))
    assert best is not None
    assert best.shape == (2, 3, 96, 96)
