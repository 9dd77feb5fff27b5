"""Packed integers: their layout bit by bit, any shape, and little memory on the way."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from companion import pack, unpack
from companion.errors import SchemeError
from companion.numerics.packing import narrowest
from companion.numerics.scheme import integer_range

WIDTHS = range(2, 9)
bits = st.integers(2, 8)
seeds = st.integers(0, 2**31)


def integers(width: int, *shape: int, seed: int = 0) -> torch.Tensor:
    low, high = integer_range(width)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int8)


@settings(max_examples=60, deadline=None)
@given(seeds, bits, st.integers(0, 40), st.sampled_from([(), (1,), (3,), (2, 3)]))
def test_unpack_is_the_inverse_of_pack(seed, width, n, rows):
    qmin, qmax = integer_range(width)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(qmin, qmax + 1, (*rows, n), generator=generator, dtype=torch.int8)
    packed = pack(q, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*rows, -(-n // 8) * width)
    back = unpack(packed, width, n)
    assert back.dtype == torch.int8
    assert torch.equal(back, q)


def by_definition(row: list[int], width: int) -> list[int]:
    """Write the integers one after the other, lowest bit first, and cut the string into bytes."""
    row = row + [0] * (-len(row) % 8)
    string = "".join(format(v % 2**width, f"0{width}b")[::-1] for v in row)
    return [int(string[i : i + 8][::-1], 2) for i in range(0, len(string), 8)]


@settings(max_examples=60, deadline=None)
@given(bits.flatmap(lambda b: st.tuples(
    st.just(b), st.lists(st.integers(*integer_range(b)), min_size=1, max_size=20))))  # fmt: skip
def test_packed_bytes_are_one_string_of_bits(case):
    width, row = case
    packed = pack(torch.tensor(row, dtype=torch.int8), width)
    assert packed.tolist() == by_definition(row, width)


@pytest.mark.parametrize(
    ("width", "row", "expected"),
    [
        (4, [1, 2, -1, -8, 7, 0, 0, 3], [0x21, 0x8F, 0x07, 0x30]),  # low nibble first
        (4, [5], [0x05, 0, 0, 0]),
        (2, [1, -2, -1, 0, 0, 0, 0, -2], [0b00111001, 0b10000000]),
        (3, [1, 2, 3, -4, -3, -2, -1, 0], [0b11010001, 0b01011000, 0b00011111]),
        (8, [-1, 0, 1, 127, -128, 2, 3, 4], [255, 0, 1, 127, 128, 2, 3, 4]),
    ],
)
def test_packed_bytes_by_hand(width, row, expected):
    assert pack(torch.tensor(row, dtype=torch.int8), width).tolist() == expected


def test_padding_is_zeros_that_unpack_leaves_out():
    q = torch.tensor([[-8] * 9], dtype=torch.int8)
    assert pack(q, 4).tolist() == [[0x88] * 4 + [0x08, 0, 0, 0]]
    assert unpack(pack(q, 4), 4, 16).tolist() == [[-8] * 9 + [0] * 7]


@pytest.mark.parametrize("width", [2, 3, 4, 7])
def test_integers_that_do_not_fit_are_refused(width):
    qmin, qmax = integer_range(width)
    for bad in (qmin - 1, qmax + 1):
        with pytest.raises(SchemeError, match=f"outside {qmin} to {qmax}"):
            pack(torch.tensor([0, bad], dtype=torch.int8), width)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 5)])
def test_empty_tensors_pack_and_come_back(width, shape):
    q = integers(width, *shape)
    packed = pack(q, width)
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 8) * width)
    assert unpack(packed, width, shape[-1]).shape == shape


@pytest.mark.parametrize("width", WIDTHS)
def test_strides_do_not_matter(width):
    q = integers(width, 24, 11)
    views = [q.t(), q[::2], q[:, ::3], q[:, 1:9], q[1:2].expand(4, 11), q[:, :1].expand(24, 16)]
    for view in views:
        packed = pack(view, width)
        assert torch.equal(packed, pack(view.clone(memory_format=torch.contiguous_format), width))
        assert torch.equal(unpack(packed, width, view.shape[-1]), view)
    packed = pack(q, width)
    for rows in (packed[::2], packed.t().contiguous().t()):
        assert torch.equal(unpack(rows, width, 11), q[: len(rows)] if len(rows) == 24 else q[::2])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_wider_integer_types_pack_alike(dtype):
    q = integers(3, 5, 13)
    assert torch.equal(pack(q.to(dtype), 3), pack(q, 3))
    with pytest.raises(SchemeError, match="does not fit"):
        pack(torch.tensor([256], dtype=dtype), 3)  # would be 0 in one byte


def test_bytes_of_another_length_are_refused():
    packed = pack(integers(4, 2, 16), 4)
    for n in (8, 17, 24):
        with pytest.raises(SchemeError, match=f"{n} integers of 4 bits are packed in"):
            unpack(packed, 4, n)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside this context held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        given = [*args, *(kwargs or {}).values()]
        known = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
            size = result.untyped_storage().nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(result.untyped_storage(), self.release, size)
        return result

    def release(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("width", WIDTHS)
def test_packing_takes_three_bytes_a_weight_at_most(width):
    q = integers(width, 64, 4001)  # padded, which takes one byte of the three
    with PeakBytes() as packing:
        packed = pack(q, width)
    with PeakBytes() as unpacking:
        unpack(packed, width, q.shape[-1])
    assert packed.numel() <= packing.peak <= 3.01 * q.numel()
    assert q.numel() <= unpacking.peak <= 2.01 * q.numel()  # .01: the padding


@pytest.mark.parametrize("width", WIDTHS)
def test_unpacking_gives_memory_of_its_own(width):
    packed = pack(integers(width, 4, 16), width)
    before = packed.clone()
    unpack(packed, width, 16).zero_()
    assert torch.equal(packed, before)


def test_narrowest_loses_no_value():
    x = torch.randn(64, 64)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = narrowest(x.to(dtype).float())
        assert narrow.dtype == dtype
        assert torch.equal(narrow, x.to(dtype))
    for kept in (x, x.bfloat16(), x.double(), x.bfloat16().float()[:8], torch.zeros(0),
                 torch.full((64, 64), torch.nan), torch.arange(4096)):  # fmt: skip
        assert narrowest(kept) is kept
