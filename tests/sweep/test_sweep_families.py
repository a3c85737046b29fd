"""Sweeps over families of objectives: what is stored once, resumed, validated and made again."""

import json
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import featvis_func as fv
from featvis_func import objective as objectives
from featvis_func.cli import main as cli
from featvis_func.models import Model
from featvis_func.rendering.spec import Selection
from featvis_func.sweep import dry_run, open_store, sweep, validate
from featvis_func.sweep import worker as workers
from featvis_func.sweep.layout import DamagedError
from tests.sweep_toys import join, kill_self, ready, start

QUICK: dict[str, Any] = {"steps": 2, "size": 16, "precision": "float32", "compile": "no", "progress": False}
WIDTH = 48  # of texturenet's block2.conv


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(count: int = 10, names: bool = True) -> objectives.Objective:
    return fv.directions(
        "block2.conv", random(count, WIDTH), names=[f"row {i}" for i in range(count)] if names else None
    )


@pytest.fixture
def texturenet(cached_tracing: None) -> Model:
    return fv.load_model("texturenet")


@pytest.mark.slow
def test_families_and_layers_share_a_folder(texturenet: Model, tmp_path: Path) -> None:
    several = [rows(), "head", fv.facets(fv.channel("head"), 2), fv.logits("output", [4, 2])]
    status = sweep(texturenet, several, out=tmp_path, **QUICK)
    assert (status.complete, status.filters_done) == (True, 10 + 32 + 64 + 2)
    assert validate(tmp_path).sound
    store = open_store(tmp_path)
    assert store.layers == ("head", "directions:block2.conv", "head x2", "logit:output")
    for label, objective in (("directions:block2.conv", rows()), ("head x2", several[2]), ("head", "head")):
        numbers = [2, 3]
        expected = fv.render(texturenet, objective, numbers, **QUICK)
        for number, image, score in zip(numbers, expected.images, expected.scores, strict=True):
            entry = store[label, number]
            torch.testing.assert_close(entry.image, image, atol=3e-2, rtol=0)
            assert entry.score == pytest.approx(float(score), rel=1e-3)
    members = store.members("directions:block2.conv")
    assert members is not None
    assert members.names == tuple(f"row {i}" for i in range(10))
    assert members.vectors == "matrix"
    assert torch.equal(members.tensors["matrix"], random(10, WIDTH))
    assert store.members("head") is None


def test_the_matrix_is_stored_once(texturenet: Model, tmp_path: Path) -> None:
    count = 40
    sweep(texturenet, rows(count), range(0, count, 4), out=tmp_path, unit_size=2, **QUICK)
    matrix = random(count, WIDTH).numpy().tobytes()
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and matrix in path.read_bytes()]
    assert [path.parent.name for path in holding] == ["members"]
    assert len((tmp_path / "run.json").read_bytes()) < 4000


def test_a_family_is_made_again_from_its_folder(texturenet: Model, tmp_path: Path) -> None:
    family = fv.sae("block2.conv", random(6, WIDTH), random(6), center=random(WIDTH), activation="topk", k=2)
    mixed = family - 0.5 * fv.directions("block2.conv", random(6, WIDTH, seed=3), similarity="cosine")
    sweep(texturenet, {"mixed": mixed}, [1], out=tmp_path, **QUICK)
    made = open_store(tmp_path).objective("mixed")
    values = {"block2.conv": random(WIDTH, 5, 5)}
    assert made.family is not None
    assert made.family.label == "mixed"
    for number in range(6):
        assert torch.equal(made(values, torch.tensor(number)), mixed(values, torch.tensor(number)))


def test_another_matrix_names_or_objective_is_another_sweep(texturenet: Model, tmp_path: Path) -> None:
    sweep(texturenet, {"mine": rows()}, [0], out=tmp_path, **QUICK)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = random(10, WIDTH)
    changed[7, 3] += 1e-6
    for other, word in (
        (
            fv.directions("block2.conv", changed, names=[f"row {i}" for i in range(10)]),
            "families.mine.tensors.matrix.sha256",
        ),
        (rows(names=False), "families.mine.sha256"),
        (fv.directions("block2.conv", random(10, WIDTH), similarity="cosine"), "families.mine.objective"),
    ):
        with pytest.raises(ValueError, match=word):
            sweep(texturenet, {"mine": other}, [0], out=tmp_path, **QUICK)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sweep(texturenet, {"mine": rows()}, [0], out=tmp_path, **QUICK).complete


def own(matrix: torch.Tensor) -> objectives.Objective:
    def score(activations: Any, row: Any) -> torch.Tensor:
        return activations["block2.conv"].mean((-2, -1)) @ row["rows"]

    return objectives.family("own", "block2.conv", {"rows": matrix}, score)


@pytest.mark.parametrize("make", [
    lambda rows: objectives.direction("block2.conv", rows[0]),
    lambda rows: objectives.member(fv.directions("block2.conv", rows), 1),
    lambda rows: fv.channel("block2.conv") - 0.5 * objectives.direction("block2.conv", rows[0]),
    own,
    lambda rows: 0.5 * own(rows),
    lambda rows: own(rows) - fv.channel("block2.conv", 3),
    lambda rows: fv.facets(own(rows), 2),
    lambda rows: own(rows) + fv.directions("block2.conv", random(3, WIDTH)),
], ids=["direction", "member", "difference", "own", "scaled", "own less a channel", "facets", "sum"])  # fmt: skip
def test_tensors_of_any_objective_are_part_of_the_configuration(make: Any, texturenet: Model, tmp_path: Path) -> None:
    sweep(texturenet, make(random(3, WIDTH)), [0, 1], out=tmp_path, **QUICK)
    assert sweep(texturenet, make(random(3, WIDTH)), [0, 1], out=tmp_path, **QUICK).complete
    with pytest.raises(ValueError, match="holds a sweep with other options"):
        sweep(texturenet, make(random(3, WIDTH, seed=1)), [0, 1], out=tmp_path, **QUICK)


def test_equal_tensors_are_stored_once_under_all_their_names(texturenet: Model, tmp_path: Path) -> None:
    family = rows(names=False)
    mixed = family - 0.1 * objectives.member(rows(names=False), 0)
    sweep(texturenet, {"mixed": mixed}, [1], out=tmp_path, **QUICK)
    (path,) = (tmp_path / "members").iterdir()
    assert path.read_bytes().count(random(10, WIDTH).numpy().tobytes()) == 1
    made, values = open_store(tmp_path).objective("mixed"), {"block2.conv": random(WIDTH, 5, 5)}
    assert torch.equal(made(values, torch.tensor(4)), mixed(values, torch.tensor(4)))


def test_a_flipped_bit_of_the_members_is_noticed(texturenet: Model, tmp_path: Path) -> None:
    sweep(texturenet, rows(), [0], out=tmp_path, **QUICK)
    (path,) = (tmp_path / "members").iterdir()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    store = open_store(tmp_path)
    for read in (store.members, store.objective):
        with pytest.raises(DamagedError, match="missing or damaged; run the sweep again"):
            read("directions:block2.conv")


@pytest.mark.slow
def test_filters_count_as_far_as_each_layer_and_family_has_them(texturenet: Model, tmp_path: Path) -> None:
    sweep(texturenet, ["head", rows(4)], range(6), out=tmp_path, **QUICK)
    store = open_store(tmp_path)
    assert store.filters("head") == tuple(range(6))
    assert store.filters("directions:block2.conv") == tuple(range(4))


def test_a_damaged_or_missing_members_file_is_reported_and_written_again(texturenet: Model, tmp_path: Path) -> None:
    sweep(texturenet, rows(), [0], out=tmp_path, **QUICK)
    (path,) = (tmp_path / "members").iterdir()
    whole = path.read_bytes()
    for data in (whole[:-8], None):
        path.unlink() if data is None else path.write_bytes(data)
        report = validate(tmp_path)
        assert not report.sound
        assert list(report.status.damaged) == [f"members/{path.name}"]
        sweep(texturenet, rows(), [0], out=tmp_path, **QUICK)
        assert path.read_bytes() == whole
        assert validate(tmp_path).sound
    path.with_name("other.safetensors").write_bytes(b"")
    assert validate(tmp_path).orphans == ("members/other.safetensors",)


@pytest.mark.slow
def test_groups_of_facets_are_never_divided(texturenet: Model, tmp_path: Path) -> None:
    family = fv.facets(fv.channel("head"), 3)
    plan = dry_run(texturenet, family, **{k: v for k, v in QUICK.items() if k != "progress"}).plans[0]
    assert (plan.batch_size, plan.unit_size, len(plan.filters)) == (15, 15, 96)
    wrong: list[dict[str, Any]] = [{"batch_size": 2}, {"unit_size": 4}]
    for sizes in wrong:
        with pytest.raises(
            ValueError, match="come in groups of 3: batch_size must be at least 3 and unit_size a multiple"
        ):
            sweep(texturenet, family, out=tmp_path / "none", **QUICK, **sizes)
    with pytest.raises(ValueError, match="depend on each other and take no tolerance"):
        sweep(texturenet, family, out=tmp_path / "none", tolerance=0.1, **QUICK)
    assert not (tmp_path / "none").exists()
    assert sweep(texturenet, family, range(9), out=tmp_path, unit_size=6, **QUICK).complete


@pytest.mark.parametrize(("layers", "filters", "words"), [
    (fv.directions("block2.conv", torch.ones(3, 47)), None, "has 47 numbers, but layer 'block2.conv' has 48 channels"),
    (fv.directions("nosuch", torch.ones(3, 48)), None, "no layer 'nosuch'"),
    (rows(), [10], "describes images 0 to 9, got 10"),
    ([rows(), rows()], None, "two families are called 'directions:block2.conv'"),
    ({"head": rows(), "x": "head"}, None, "a layer and a family are both called 'head'"),
    ([fv.channel("head"), "head"], None, "a layer is asked for twice"),
    (fv.channel("head") - objectives.diversity("head"), None, "all of them depend on each other"),
    (objectives.l2(), None, "reads no layer"),
    (Selection(rows(), [1]), [1], "are given twice"),
    (7, None, "names or patterns"),
    ("directions:block2.conv:nosuch.npy", None, "no dictionary 'nosuch.npy'"),
], ids=str)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_written(
    layers: Any, filters: Any, words: str, texturenet: Model, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        sweep(texturenet, layers, filters, out=tmp_path / "new", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_family_of_ones_own_is_swept_but_not_made_again(texturenet: Model, tmp_path: Path) -> None:
    own = objectives.family(
        "two sides",
        "block2.conv",
        {"sign": torch.tensor([1.0, -1.0])},
        lambda a, row: row["sign"] * a["block2.conv"].mean(),
    )
    assert sweep(texturenet, own, out=tmp_path, **QUICK).complete
    with pytest.raises(ValueError, match="cannot be made again"):
        open_store(tmp_path).objective("two sides")


@pytest.mark.parametrize("family", [
    fv.sae("a", random(6, 4), random(6), activation="topk", k=2) - 0.5 * fv.channel("a", 1),
    fv.facets(fv.neurons("a", range(2), [(0, 0), (1, 1)]), 2),
], ids=str)  # fmt: skip
def test_a_family_reaches_the_actors_of_a_cluster(family: objectives.Objective) -> None:
    cloudpickle = pytest.importorskip("ray.cloudpickle")
    sent = cloudpickle.loads(cloudpickle.dumps(family))
    values = {"a": random(4, 2, 2)}
    for number in range(4):
        assert torch.equal(sent(values, torch.tensor(number)), family(values, torch.tensor(number)))


def sweep_and_die(connection: Connection, out: Path, commits: int) -> None:
    """Sweep in a child process that kills itself after some commits."""
    ready(connection)
    commit, left = workers.commit, [commits]

    def counted(*arguments: Any, **options: Any) -> Any:
        if left[0] == 0:
            kill_self()
        left[0] -= 1
        return commit(*arguments, **options)

    workers.commit = counted
    sweep("texturenet", rows(24), out=out, unit_size=2, threads=1, **QUICK)


@pytest.mark.slow
def test_a_killed_sweep_of_a_family_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    for number in range(4):
        process, connection = start(sweep_and_die, tmp_path / "killed", 3 - number % 2)
        connection.send(None)
        assert join(process, connection) != 0
    done = open_store(tmp_path / "killed").status().done
    assert 0 < done < 12
    for out in ("killed", "whole"):
        assert sweep("texturenet", rows(24), out=tmp_path / out, unit_size=2, threads=1, **QUICK).complete
        assert validate(tmp_path / out).sound
    killed, whole = (open_store(tmp_path / out).layer("directions:block2.conv") for out in ("killed", "whole"))
    assert torch.equal(killed.images, whole.images)
    assert torch.equal(killed.scores, whole.scores)


class TestCommandLine:
    @pytest.fixture
    def dictionary(self, tmp_path: Path) -> Path:
        path = tmp_path / "rows.safetensors"
        safetensors.torch.save_file({"rows": random(10, WIDTH)}, path)
        (tmp_path / "rows.names.txt").write_text("".join(f"row {i}\n" for i in range(10)))
        return path

    def test_sweep_takes_objectives_beside_layers(
        self, dictionary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cached_tracing: None
    ) -> None:
        out = tmp_path / "out"
        words = ["sweep", "texturenet", "--layers", "head", "--objective", f"directions:block2.conv:{dictionary}:0-3"]
        words += ["--objective", "channel:block1.conv:2,5", "--steps", "2", "--size", "16", "--out", str(out)]
        words += ["--precision", "float32", "--compile", "no", "--device", "cpu"]
        for _ in range(2):
            assert cli.main(words) == 0
            assert "38 of 38 images" in capsys.readouterr().out
        store = open_store(out)
        assert store.layers == ("head", "directions:block2.conv", "block1.conv")
        assert store.filters("directions:block2.conv") == (0, 1, 2, 3)
        assert store.filters("block1.conv") == (2, 5)
        members = store.members("directions:block2.conv")
        assert members is not None
        assert members.names is not None
        assert members.names[3] == "row 3"
        assert cli.main(["validate", str(out)]) == 0

    def test_render_takes_an_objective_what_is_subtracted_and_facets(self, dictionary: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        words = [
            "render",
            "--objective",
            f"directions:block2.conv:{dictionary}[rows]:2-3",
            "--facets",
            "2",
            "--steps",
            "1",
        ]
        words += ["--minus", "0.5*channel:block1.conv:7", "--size", "16", "--out", str(out), "--no-gallery"]
        assert cli.main(words) == 0
        config = json.loads((out / "run.json").read_text())["config"]
        assert config["names"]["5"] == "row 2, facet 1"
        assert config["family"]["command"][-2:] == ["--facets", "2"]
        assert "member(channel('block1.conv'), 7)" in config["objective"]

    @pytest.mark.parametrize(("words", "message"), [
        (["--objective", "channel:head", "--layer", "head"], "give --layer or --objective, not both"),
        (["--facets", "2"], "--facets goes with --objective"),
        (["--minus", "channel:head:1"], "--minus goes with --objective"),
        (["--objective", "channel:head:1", "--filters", "3"], "given twice"),
        (["--objective", "chanel:head:1"], "did you mean 'channel'"),
        (["--objective", "directions:block2.conv:nosuch.pt"], "no dictionary 'nosuch.pt'"),
        (["--objective", "directions:head:{rows}"], "(10, 48)"),
        (["--objective", "directions:block2.conv:{rows}[cols]"], "cols"),
        (["--objective", "directions:block2.conv:{rows}:10"], "describes images 0 to 9, got 10"),
        (["--objective", "sae:block2.conv:{rows}"], "has no encoder"),
    ])  # fmt: skip
    def test_bad_input_is_one_line_and_leaves_nothing(
        self, words: list[str], message: str, dictionary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        words = [word.format(rows=dictionary) for word in words]
        assert cli.main(["render", *words, "--steps", "1", "--size", "16", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert message in error
        assert not out.exists()
