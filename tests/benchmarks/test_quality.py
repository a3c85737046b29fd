"""The benchmark of activation over time, on few steps."""

import pytest

from benchmarks import quality
from benchmarks.common import contact_sheet
from featvis_func.models import Model


def test_comparison_takes_the_first_run_that_matches_the_published_script() -> None:
    published = [quality.Point(64, 30.0, 900.0, 0.0, 0.3), quality.Point(128, 60.0, 1000.0, 0.0, 0.02)]
    runs = [
        quality.Point(12, 3.0, 950.0, 0.0, 0.0),
        quality.Point(16, 4.0, 1000.0, 0.0, 0.01),
        quality.Point(20, 5.0, 1100.0, 0.0, 0.5),
    ]
    assert quality.compare(published, runs) == (16, 15.0, 0.5, 0.02, 0.01)
    assert quality.compare(published, runs[:1]) == (None, None, None, 0.02, None)
    saturated = [run._replace(saturation=0.026) for run in runs]
    assert quality.compare(published, saturated).steps_to_match is None
    clear = [published[1]._replace(saturation=0.0)]
    assert quality.compare(clear, runs).steps_to_match is None
    faint = [run._replace(saturation=0.001) for run in runs]
    assert quality.compare(clear, faint).saturation_ratio == pytest.approx(0.001 / 1e-6)
    assert quality.compare(clear, faint).saturation_published == 0.0


@pytest.mark.slow
def test_quality_measures_a_model_of_another_input_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATVIS_WEIGHTS", "absent")
    monkeypatch.setattr(quality, "PUBLISHED_STEPS", (1, 2, 3))
    monkeypatch.setattr(quality, "LIBRARY_STEPS", (1, 2))
    todo = quality.trained_cases("cpu")
    assert [(case.name, case.layer) for case in todo] == [("texturenet", layer) for layer in quality.TEXTURENET_LAYERS]
    published, library, images = quality.measure(todo[0], "cpu")
    assert [point.steps for point in published] == [1, 2, 3]
    assert [point.steps for point in library] == [1, 2]
    assert all(point.seconds > 0 and point.robust > 0 for point in (*published, *library))
    assert published[0].seconds < published[1].seconds < published[2].seconds
    assert images.shape == (16, 3, 96, 96)
    sheet = contact_sheet(images, rows=2)
    assert sheet.width > 3 * sheet.height


def test_quality_covers_three_layers_of_squeezenet(squeezenet: Model) -> None:
    todo = [case for case in quality.trained_cases("cpu") if case.name == "squeezenet1_0"]
    assert "features.9.expand3x3" in (layers := [case.layer for case in todo])
    assert len(set(layers)) == 3
    assert {case.model.size for case in todo} == {squeezenet.size}
    assert all(dict(case.model.module.named_modules()).get(layer) for case, layer in zip(todo, layers, strict=True))
