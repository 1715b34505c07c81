"""Matrix products in C are PyTorch's, whatever the sizes, strides and groups."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decoder import a_model

from open_mythos.native import compiler
from open_mythos.ops import product as product_module
from open_mythos.ops.kernels import has_half, kernels
from open_mythos.ops.product import (
    add_grouped_outers,
    add_product,
    grouped_outer,
    grouped_product,
    product,
    rows_product,
)

needs_native = pytest.mark.skipif(kernels() is None, reason="no C code: no gcc, no AVX-512, or OPEN_MYTHOS_NATIVE=0")
SIZES = st.integers(1, 70)
USES_GCC = "gcc" in " ".join(compiler() or []) or "Free Software" in subprocess.run(
    [*(compiler() or ["true"]), "--version"], capture_output=True, text=True
).stdout  # fmt: skip


@pytest.fixture(autouse=True)
def natively(monkeypatch):
    """Matrices of all sizes go to the C code."""
    monkeypatch.setattr(product_module, "_ENOUGH", 0)
    monkeypatch.setattr(product_module, "_ENOUGH_OF_ROWS", 0)


def matrix(rows, columns, layout):
    """Random numbers, row by row, column by column, or every other of each."""
    if layout == "columns":
        return torch.randn(columns, rows).t()
    return torch.randn(rows, columns) if layout == "rows" else torch.randn(2 * rows, 2 * columns)[::2, ::2]


@pytest.mark.skipif(
    os.environ.get("OPEN_MYTHOS_NATIVE") == "0" or torch.backends.cpu.get_cpu_capability() != "AVX512" or not USES_GCC,
    reason="needs gcc and AVX-512",
)
def test_the_c_code_is_there_where_it_can_be():
    assert kernels() is not None, "other tests of it would be skipped without a word"


@needs_native
@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 600), SIZES, *[st.sampled_from(["rows", "columns", "strided"])] * 2)
def test_a_product_is_that_of_double_precision(M, K, N, a_layout, b_layout):
    a, b = matrix(M, K, a_layout), matrix(K, N, b_layout)
    expected = 1.5 * a.double() @ b.double()
    assert_near(product(a, b, 1.5).double(), expected)
    into = torch.randn(M, N + 3)[:, 1:-2]  # a part of a larger matrix, the rest of which stays
    expected = expected + into
    around = into._base.clone()
    add_product(into, a, b, 1.5)
    assert_near(into.double(), expected)
    around[:, 1:-2] = into
    assert torch.equal(around, into._base)


@needs_native
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 300), SIZES, *[st.sampled_from(["rows", "columns", "strided"])] * 2)
def test_a_product_of_few_rows_is_that_of_double_precision(N, n_in, n_out, x_layout, weight_layout):
    x, weight, to = matrix(N, n_in, x_layout), matrix(n_out, n_in, weight_layout), torch.randn(N, n_out)
    before = to.clone()
    expected = 1.5 * x.double() @ weight.double().t()
    assert_near(rows_product(x, weight, 1.5).double(), expected)
    assert_near(rows_product(x, weight, 1.5, to).double(), before + expected)
    assert torch.equal(to, before)


@needs_native
def test_a_row_has_the_same_product_whoever_stands_beside_it():
    x, weight = torch.randn(16, 200), torch.randn(100, 200)
    alone = torch.cat([rows_product(row, weight) for row in x.split(1)])
    assert torch.equal(rows_product(x, weight), alone)


@needs_native
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), SIZES, SIZES, st.sampled_from(["rows", "columns"]))
def test_groups_of_any_sizes_are_products_of_their_own(counts, K, N, layout):
    ends = torch.tensor(counts).cumsum(0).int()
    x, y = matrix(sum(counts), K, layout), torch.randn(sum(counts), N)
    weight, into = torch.randn(len(counts), N, K).transpose(1, 2), torch.randn(len(counts), K, N)
    before, rows = into.clone(), [slice(end - n, end) for n, end in zip(counts, ends.tolist(), strict=True)]
    found, sums = grouped_product(x, weight, ends), grouped_outer(x, y, ends)
    add_grouped_outers(into, [(x, y, ends), (2 * x, y, ends)])
    for e, group in enumerate(rows):
        torch.testing.assert_close(found[group], x[group] @ weight[e], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sums[e], x[group].t() @ y[group], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(into[e], before[e] + 3 * x[group].t() @ y[group], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not has_half(), reason="needs C code with bfloat16")
@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 1100), SIZES, *[st.sampled_from(["rows", "columns", "strided"])] * 2)
def test_factors_are_rounded_to_bfloat16_and_sums_are_not(M, K, N, a_layout, b_layout):
    a, b = matrix(M, K, a_layout), matrix(K, N, b_layout)
    expected = 0.5 * a.bfloat16().double() @ b.bfloat16().double()
    assert_near(product(a, b, 0.5, half=True).double(), expected)
    into = torch.randn(M, N)
    expected = expected + into
    add_product(into, a, b, 0.5, half=True)
    assert_near(into.double(), expected)


@needs_native
def test_a_row_is_the_same_whatever_stands_beside_it_and_whoever_computes_it(threads):
    a, b = torch.randn(100, 300), torch.randn(300, 130)
    threads(1)
    whole = product(a, b)
    assert torch.equal(product(a[37:40], b), whole[37:40])
    threads(3)
    assert torch.equal(product(a, b), whole)
    assert torch.equal(product(a, b.t().contiguous().t()), whole)


@needs_native
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_model_trains_as_by_pytorchs_products(attn_type, monkeypatch):
    def gradients(enough):
        monkeypatch.setattr(product_module, "_ENOUGH", enough)
        torch.manual_seed(0)
        model = a_model(attn_type=attn_type, n_experts=5, n_experts_per_tok=2).train()
        ids = torch.randint(37, (3, 21), generator=torch.Generator().manual_seed(1))
        loss = torch.nn.functional.cross_entropy(model(ids, 3).flatten(0, 1), ids.flatten())
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, native = gradients(10**9), gradients(0)
    assert plain.keys() == native.keys() and any("gate_up" in name for name in plain)
    for name, grad in plain.items():
        assert_near(native[name], grad, 1e-4, what=name)


@needs_native
def test_native_products_can_be_left_out():
    done = subprocess.run(
        [sys.executable, "-c", "from open_mythos.ops.kernels import kernels; print(kernels())"],
        env=os.environ | {"OPEN_MYTHOS_NATIVE": "0"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "None"
