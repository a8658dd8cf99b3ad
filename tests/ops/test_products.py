"""Products of 16-bit operands into float32 on a CPU."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from rlhf_fast.ops import check
from rlhf_fast.ops.linear import gradients, groups, products

LAYOUTS = ("rows", "columns", "rows with gaps", "columns with gaps")
SHAPES = [(5, 7, 9), (1, 1, 1), (1, 8, 5), (8, 5, 1), (33, 1, 17), (0, 4, 5), (4, 0, 5), (4, 5, 0)]


def lying(m: int, n: int, layout: str, dtype: torch.dtype) -> Tensor:
    """[m, n]"""
    gap = 3 if "gaps" in layout else 0
    if layout.startswith("columns"):
        return torch.randn(n, m + gap).to(dtype)[:, :m].t()
    return torch.randn(m, n + gap).to(dtype)[:, :n]


@pytest.mark.parametrize("way", ["what this CPU has", "widened"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_product_of_any_layout(way: str, dtype: torch.dtype) -> None:
    run = torch.ops.rlhf_fast.wide_product if way != "widened" else products.KERNEL.fallback
    torch.manual_seed(0)
    for (m, k, n), layouts in product(SHAPES, product(LAYOUTS, repeat=3)):
        a, b, before = map(lying, (m, k, m), (k, n, n), layouts, (dtype, dtype, torch.float32))
        exact = a.double() @ b.double()
        size = a.double().abs() @ b.double().abs()  # of the sums: k roundings each
        for first in (True, False):
            out = before.clone(memory_format=torch.preserve_format)
            if first:
                out.fill_(torch.nan)  # what is overwritten is not read
            run(a, b, out, first)
            wrong = out.double() - exact - (0 if first else before.double())
            bound = (k + 2) * 2**-23 * (size + (0 if first else before.double().abs()))
            assert (wrong.abs() <= bound + 1e-30).all(), (m, k, n, layouts, first)


def test_other_shapes_and_types_are_refused() -> None:
    if not products.on_cpu():
        pytest.skip("no MKL in this torch, or no C++ kernels: wide_product is its fallback")
    a, b, out = torch.zeros(2, 3).half(), torch.zeros(3, 4).half(), torch.zeros(2, 4)
    for wrong in ((a, b.t(), out), (a, b, out.t()), (a, b.bfloat16(), out), (a, b, out.double()),
                  (a.float(), b.float(), out), (a, b, torch.zeros(2, 8)[:, ::2])):  # fmt: skip
        with pytest.raises(RuntimeError):
            torch.ops.rlhf_fast.wide_product(*wrong, True)


def test_rows_are_added_where_labels_repeat() -> None:
    total, places = torch.zeros(4, 3), torch.tensor([2, 0, 2, 2])
    rows = torch.arange(12.0).view(4, 3)
    gradients.add_in_order(total, places, rows)
    assert torch.equal(total[2], rows[0] + rows[2] + rows[3]) and torch.equal(total[0], rows[1])
    assert not total[1].any() and not total[3].any()


def test_only_labels_of_this_part_are_taken_out() -> None:
    logits = torch.arange(1.0, 13.0).view(3, 4)
    dlogits = logits.bfloat16()
    labels = torch.tensor([[2, check.ELSEWHERE, check.IGNORE_INDEX]])

    def write(columns, of: Tensor, out: Tensor) -> None:
        assert columns(logits).flatten().tolist() == [3.0, 5.0, 9.0]  # some token, where none is
        assert of.tolist() == [[0, check.ELSEWHERE, check.IGNORE_INDEX]]  # of one column
        out.fill_(7.0)

    taken = groups.taken_out(dlogits, labels, write)
    assert taken.entries.tolist() == [7.0, 0.0, 0.0] and taken.entries.dtype == torch.float32
    left = logits.clone()
    left[0, 2] = 0.0
    assert torch.equal(dlogits.float(), left)
