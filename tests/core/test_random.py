"""The random number generator: known answers, equality across execution modes, and statistics."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode

from featvis_func import random
from featvis_func.tree import tree_leaves

COUNT = 100_000
# As in compile_step: without this option inductor compiles the rounds slowly.
INDUCTOR: dict[str, Any] = {"realize_opcount_threshold": 10}


def words(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(value, dtype=torch.int64) for value in values)


def ks_distance(sample: Tensor, distribution: Callable[[Tensor], Tensor]) -> float:
    """Return the Kolmogorov-Smirnov distance between a sample and a distribution function."""
    expected = distribution(sample.double().sort().values)
    steps = torch.arange(len(sample) + 1, dtype=torch.float64) / len(sample)
    return max((steps[1:] - expected).max().item(), (expected - steps[:-1]).max().item())


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


# P(distance > 2.225 / sqrt(n)) is 1e-4 if the distribution is correct (Kolmogorov's limit, 2 exp(-2 x**2)).
KS_BOUND = 2.225 / math.sqrt(COUNT)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_matches_known_answers(
    counter: tuple[int, int], key: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Test vectors from Random123 1.14, tests/kat_vectors, threefry2x32 with 20 rounds."""
    result = random.threefry2x32((words(*key)[0], words(*key)[1]), (words(*counter)[0], words(*counter)[1]))
    assert tuple(map(int, result)) == expected


def test_threefry_broadcasts_elementwise() -> None:
    """Counters may be tensors of any shape."""
    key, counters = words(0x13198A2E, 0x03707344), torch.tensor([[0, 0x243F6A88], [5, 7]])
    many = random.threefry2x32((key[0], key[1]), (counters, torch.full_like(counters, 0x85A308D3)))
    assert many[0].shape == (2, 2)
    assert (int(many[0][0, 1]), int(many[1][0, 1])) == (0xC4923A9C, 0x483DF7A0)


@pytest.mark.slow
@pytest.mark.parametrize("function", [random.bits, random.uniform], ids=["bits", "uniform"])
def test_bits_and_uniform_are_bit_equal_eager_vmapped_and_compiled(
    function: Callable[[Tensor, tuple[int, ...]], Tensor],
) -> None:
    keys = torch.stack([random.key(seed) for seed in (0, 1, 2**64 - 1)])
    eager = torch.stack([function(key, (3, 7)) for key in keys])
    assert torch.equal(vmap(lambda key: function(key, (3, 7)))(keys), eager)
    compiled = torch.compile(lambda key: function(key, (3, 7)), fullgraph=True, options=INDUCTOR)
    assert torch.equal(torch.stack([compiled(key) for key in keys]), eager)


@pytest.mark.slow
def test_normal_is_close_eager_vmapped_and_compiled() -> None:
    """Equal up to rounding: vectorised logarithms differ in the last bit."""
    keys = torch.stack([random.key(seed) for seed in (0, 1, 2**64 - 1)])
    eager = torch.stack([random.normal(key, (3, 7)) for key in keys])
    torch.testing.assert_close(vmap(lambda key: random.normal(key, (3, 7)))(keys), eager, rtol=1e-6, atol=1e-6)
    compiled = torch.compile(lambda key: random.normal(key, (3, 7)), fullgraph=True, options=INDUCTOR)
    result = torch.stack([compiled(key) for key in keys])
    torch.testing.assert_close(result, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_bits_and_uniform_are_bit_equal_on_cuda() -> None:
    for function in (random.bits, random.uniform):
        on_cuda = function(random.key(3, device="cuda"), (1001,))
        assert on_cuda.is_cuda
        assert torch.equal(on_cuda.cpu(), function(random.key(3), (1001,)))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2,), (7,), (8,), (3, 5), (2, 0, 3), (2, 3, 4)], ids=str)
def test_shapes_and_dtypes(shape: tuple[int, ...]) -> None:
    key = random.key(1)
    assert random.bits(key, shape).shape == random.uniform(key, shape).shape == random.normal(key, shape).shape == shape
    assert random.bits(key, shape).dtype == torch.int64
    assert random.uniform(key, shape).dtype == random.normal(key, shape).dtype == torch.float32


@pytest.mark.parametrize("count", [10, 11])
def test_values_do_not_repeat(count: int) -> None:
    for values in (random.bits(random.key(4), (count,)), random.normal(random.key(4), (count,))):
        assert len(values.unique()) == count


@pytest.mark.parametrize("count", [COUNT, COUNT + 1])
def test_each_bit_is_set_half_of_the_time(count: int) -> None:
    """Each of the 32 bits is set in half of the words within 5 standard errors, and words have 32 bits."""
    values = random.bits(random.key(11), (count,))
    assert int(values.min()) >= 0
    assert int(values.max()) < 2**32
    for position in range(32):
        fraction = (values >> position & 1).double().mean().item()
        assert abs(fraction - 0.5) < 5 * 0.5 / math.sqrt(count)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.0, 5.0)])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_uniform_statistics(seed: int, low: float, high: float) -> None:
    x = random.uniform(random.key(seed), (COUNT,), low=low, high=high)
    width = high - low
    assert low <= x.min().item()
    assert x.max().item() < high if low == 0 else x.max().item() <= high
    assert ks_distance(x, lambda v: (v - low) / width) < KS_BOUND
    # Five standard errors: sqrt(1/12/n) for the mean, sqrt(1/180/n) for the variance.
    assert abs(x.double().mean().item() - (low + high) / 2) < 5 * width * math.sqrt(1 / 12 / COUNT)
    assert abs(x.double().var().item() - width**2 / 12) < 5 * width**2 * math.sqrt(1 / 180 / COUNT)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_normal_statistics(seed: int) -> None:
    x = random.normal(random.key(seed), (COUNT,))
    assert x.abs().max().item() < 5.8
    assert ks_distance(x, normal_cdf) < KS_BOUND
    assert abs(x.double().mean().item()) < 5 / math.sqrt(COUNT)
    assert abs(x.double().var().item() - 1) < 5 * math.sqrt(2 / COUNT)
    assert abs((x.double() ** 4).mean().item() - 3) < 5 * math.sqrt(96 / COUNT)
    cosines, sines = x[: COUNT // 2], x[COUNT // 2 :]
    assert abs((cosines * sines).double().mean().item()) < 5 / math.sqrt(COUNT // 2)


def test_extreme_words_give_finite_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logarithm never receives 0, and uniform numbers stay below 1."""
    for word in (0, 0xFFFFFFFF):
        monkeypatch.setattr(random, "bits", lambda key, shape, word=word: torch.full(tuple(shape), word))
        assert random.normal(random.key(0), (4,)).isfinite().all()
        assert random.normal(random.key(0), (4,)).abs().max() < 5.8
        assert random.uniform(random.key(0), (4,)).max() < 1


@pytest.mark.parametrize(
    "neighbour",
    [
        lambda seed: random.key(seed + 1),
        lambda seed: random.key(seed + 2**32),
        lambda seed: random.fold_in(random.key(seed), 0),
        lambda seed: random.fold_in(random.key(seed), 1),
    ],
    ids=["next seed", "next high word", "folded 0", "folded 1"],
)
def test_neighbouring_keys_are_independent(neighbour: Callable[[int], Tensor]) -> None:
    """Numbers, their squares and shifted numbers are uncorrelated within 5 standard errors."""
    x, y = (random.normal(k, (COUNT,)).double() for k in (random.key(20), neighbour(20)))
    for a, b in ((x, y), (x**2, y**2), (x[1:], y[:-1])):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1].item()) < 5 / math.sqrt(COUNT)
    assert not torch.equal(x, y)


def test_derived_keys_are_distinct() -> None:
    """1000 numbers, 2 streams and 2 parent keys give 4000 distinct keys with uncorrelated first numbers."""
    number = torch.arange(1000)
    keys = torch.cat(
        [
            vmap(lambda n, seed=seed, stream=stream: random.fold_in(random.key(seed), n, stream=stream))(number)
            for seed in (0, 1)
            for stream in (0, 1)
        ]
    )
    assert len(keys.unique(dim=0)) == 4000
    first = vmap(lambda k: random.uniform(k))(keys)
    assert abs(torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1].item()) < 5 / math.sqrt(4000)
    assert ks_distance(first, lambda v: v) < 2.225 / math.sqrt(4000)


def test_order_of_fold_in_matters() -> None:
    key = random.key(0)
    one_two = random.fold_in(random.fold_in(key, 1), 2)
    two_one = random.fold_in(random.fold_in(key, 2), 1)
    assert not torch.equal(one_two, two_one)
    assert not torch.equal(random.fold_in(key, 1, stream=2), random.fold_in(key, 2, stream=1))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_split_equals_fold_in(count: int) -> None:
    keys = random.split(random.key(9), count)
    assert len(keys) == count
    for i, key in enumerate(keys):
        assert key.shape == (2,)
        assert torch.equal(key, random.fold_in(random.key(9), i))


def test_fold_in_accepts_integers_and_tensors_modulo_2_to_the_32() -> None:
    key = random.key(2)
    for number in (0, 3, 2**32 - 1):
        assert torch.equal(random.fold_in(key, number), random.fold_in(key, torch.tensor(number)))
    assert torch.equal(random.fold_in(key, 2**32 + 3), random.fold_in(key, 3))
    assert torch.equal(random.fold_in(key, -1), random.fold_in(key, torch.tensor(2**32 - 1)))


@pytest.mark.parametrize(
    ("seed", "expected"), [(0, [0, 0]), (7, [0, 7]), (2**32, [1, 0]), (2**64 - 1, [2**32 - 1, 2**32 - 1])]
)
def test_key_holds_the_high_and_low_words_of_the_seed(seed: int, expected: list[int]) -> None:
    assert random.key(seed).tolist() == expected


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_key_rejects_seeds_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed must be in \[0, 2\*\*64\), got {seed}$"):
        random.key(seed)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    before = torch.get_rng_state()
    first = random.normal(random.fold_in(random.key(0), 1), (5,))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        assert torch.equal(random.normal(random.fold_in(random.key(0), 1), (5,)), first)


def test_stream_may_be_a_tensor() -> None:
    key, streams = random.key(5), torch.tensor([0, 1, 2**31, 2**32 - 1])
    together = vmap(lambda stream: random.fold_in(key, 3, stream=stream))(streams)
    assert torch.equal(together, torch.stack([random.fold_in(key, 3, stream=int(s)) for s in streams]))


def test_numbers_are_drawn_in_few_operations_on_words_of_32_bits() -> None:
    seen: list[Tensor] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            seen.extend(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
            return output

    with Seen():
        random.normal(random.key(0), (10, 100))
    assert len(seen) < 150
    assert all(tensor.dtype != torch.int64 for tensor in seen if tensor.numel() >= 500)
