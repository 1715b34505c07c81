"""Matrix products: of two matrices, of batches of them, and of groups of rows.

PyTorch multiplies float32 matrices on x86 by MKL, which uses vectors of 256 bits on processors of other makers than its
own. ``native/products.h`` uses those of 512 bits wherever there are any, and is then twice as fast; it reads matrices
as they lie, adds to sums in place, and knows groups of any sizes. Where it cannot be had (see
:mod:`open_mythos.ops.kernels`), for other dtypes and devices and for small matrices, PyTorch's own functions give the
same up to rounding. Nothing here is differentiable: it is what backward passes are made of.

Shape letters: M, K times K, N; E of them; P rows of all groups.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.kernels import address, has_half, has_kernels, kernels

_ENOUGH = 2**19  # multiplications in all, below which the call costs more than it saves
_ENOUGH_OF_ROWS, _ENOUGH_FOR_THREADS = 2**16, 2**17  # the same of rows_product, and of several threads there
_FEW = 8192  # numbers up to which another call costs more than another pass
_CACHED = 2**18  # numbers of a product in another dtype that is made at one time, before it is added
_ALIGN = 16  # bytes; grouped_mm wants every stride to be a multiple of this


def arithmetic(x: Tensor) -> tuple[torch.dtype, bool]:
    """What products with ``x`` are made of: a dtype, and whether the C code then rounds factors to bfloat16.

    The dtype is that of ``x``, or autocast's. Autocast to bfloat16 costs a pass over every tensor and rounds sums as
    well; where the C code can, it reads float32, rounds what it multiplies, and leaves sums in float32.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x.dtype, False
    dtype = torch.get_autocast_dtype(device)
    if dtype == torch.bfloat16 and device == "cpu" and not torch.compiler.is_compiling() and has_half():
        return torch.float32, True
    return dtype, False


def product(a_MK: Tensor, b_KN: Tensor, scale: float = 1.0, half: bool = False) -> Tensor:
    """``scale * a @ b``: (M, N); with ``half`` as :func:`arithmetic` says."""
    if half or is_native(a_MK, b_KN, b_KN.shape[1]):
        out_MN = a_MK.new_empty(len(a_MK), b_KN.shape[1])
        _run(out_MN, a_MK, b_KN, scale, half=half)
        return out_MN
    if scale == 1.0:
        return a_MK @ b_KN
    return torch.addmm(a_MK.new_empty(()), a_MK, b_KN, beta=0, alpha=scale)


def rows_product(x_NI: Tensor, weight_OI: Tensor, scale: float = 1.0, to_NO: Tensor | None = None) -> Tensor:
    """``scale * x @ weight.T``, or ``to +`` that: (N, O), in as little time as a call can take."""
    n_multiplied = len(x_NI) * weight_OI.numel()
    if n_multiplied >= _ENOUGH_OF_ROWS and has_kernels(x_NI, weight_OI):
        code, x_NI, weight_OI = kernels(), x_NI.contiguous(), weight_OI.contiguous()
        assert code is not None
        n_out, n_in = weight_OI.shape
        out_NO = (
            x_NI.new_empty(len(x_NI), n_out) if to_NO is None else to_NO.clone(memory_format=torch.contiguous_format)
        )
        threads = torch.get_num_threads() if n_multiplied >= _ENOUGH_FOR_THREADS else 1
        places = out_NO.data_ptr(), x_NI.data_ptr(), weight_OI.data_ptr()
        code.mythos_rows(*places, len(x_NI), n_in, n_out, scale, to_NO is not None, threads)
        return out_NO
    if to_NO is not None:
        return torch.addmm(to_NO, x_NI, weight_OI.t(), alpha=scale)
    if scale != 1 and x_NI.numel() > _FEW:
        return torch.addmm(x_NI.new_empty(()), x_NI, weight_OI.t(), beta=0, alpha=scale)
    out_NO = F.linear(x_NI, weight_OI)
    return out_NO if scale == 1 else out_NO.mul_(scale)


def add_product(into_MN: Tensor, a_MK: Tensor, b_KN: Tensor, scale: float = 1.0, half: bool = False) -> None:
    """``into += scale * a @ b``; the sum may be in another dtype than the product."""
    if into_MN.dtype != a_MK.dtype:
        into_MN.add_(a_MK @ b_KN, alpha=scale)
    elif into_MN.stride(1) == 1 and (half or is_native(a_MK, b_KN, b_KN.shape[1])):
        _run(into_MN, a_MK, b_KN, scale, add=True, half=half)
    else:
        into_MN.addmm_(a_MK, b_KN, alpha=scale)


def add_products(into_EMN: Tensor, a_EMK: Tensor, b_EKN: Tensor) -> None:
    """``into += a @ b`` for a batch of matrices; the sums may be in another dtype than the products."""
    if into_EMN.dtype == a_EMK.dtype:
        into_EMN.baddbmm_(a_EMK, b_EKN)
        return
    n = max(1, _CACHED // into_EMN[0].numel())  # a product of its own, which should stay in the processor's cache
    for into, a, b in zip(into_EMN.split(n), a_EMK.split(n), b_EKN.split(n), strict=True):
        into.add_(a @ b)


def grouped_product(x_PK: Tensor, weight_EKN: Tensor, ends_E: Tensor, half: bool = False) -> Tensor:
    """Rows times the matrix of their group: (P, N).

    Args:
        x_PK: rows, group behind group.
        weight_EKN: a matrix for each.
        ends_E: int32, where each group's rows end.
        half: as :func:`arithmetic` says.
    """
    if half or is_native(x_PK, weight_EKN, weight_EKN.shape[2]):
        (n_groups, n_in, n_out), (each, row, column), code = weight_EKN.shape, weight_EKN.stride(), kernels()
        assert code is not None and ends_E.dtype == torch.int32 and ends_E.is_contiguous()
        out_PN = x_PK.new_empty(len(x_PK), n_out)
        code.mythos_grouped(
            out_PN.data_ptr(), x_PK.data_ptr(), *x_PK.stride(), weight_EKN.data_ptr(), each, column, row,
            ends_E.data_ptr(), n_groups, n_out, n_in, half, torch.get_num_threads(),
        )  # fmt: skip
        return out_PN
    n_in, n_out = weight_EKN.shape[1:]
    multiple = _ALIGN // x_PK.element_size()
    pad_in, pad_out = -n_in % multiple, -n_out % multiple
    if pad_in or pad_out:
        x_PK = F.pad(x_PK, (0, pad_in))
        weight_EKN = F.pad(weight_EKN, (0, pad_out, 0, pad_in))
    return F.grouped_mm(x_PK.contiguous(), weight_EKN, offs=ends_E)[:, :n_out]


def grouped_outer(x_PM: Tensor, y_PN: Tensor, ends_E: Tensor, half: bool = False) -> Tensor:
    """``x^T y`` over the rows of each group: (E, M, N)."""
    if half or is_native(x_PM, y_PN, y_PN.shape[1]):
        out_EMN = x_PM.new_empty(len(ends_E), x_PM.shape[1], y_PN.shape[1])
        add_grouped_outers(out_EMN, [(x_PM, y_PN, ends_E)], half, is_new=True)
        return out_EMN
    (n_in, n_out), multiple = (x_PM.shape[1], y_PN.shape[1]), _ALIGN // x_PM.element_size()
    x_PM, y_PN = F.pad(x_PM, (0, -n_in % multiple)), F.pad(y_PN, (0, -n_out % multiple))
    return F.grouped_mm(x_PM.contiguous().t(), y_PN.contiguous(), offs=ends_E)[:, :n_in, :n_out]


def add_grouped_outers(
    into_EMN: Tensor, several: Sequence[tuple[Tensor, Tensor, Tensor]], half: bool = False, is_new: bool = False
) -> None:
    """``into +=`` :func:`grouped_outer` of each of these x (P, M), y (P, N) and ends (E,); if new, ``into =``."""
    (x_PM, y_PN, _), code = several[0], kernels()
    if not half and not is_native(x_PM, y_PN, y_PN.shape[1]):
        if is_new:
            into_EMN.zero_()
        for x_PM, y_PN, ends_E in several:
            into_EMN.add_(grouped_outer(x_PM, y_PN, ends_E))
        return
    assert code is not None and into_EMN.is_contiguous()
    kept = [[x.contiguous() for x in of_all] for of_all in zip(*several, strict=True)]
    pointers = [(ctypes.c_void_p * len(several))(*(x.data_ptr() for x in of_all)) for of_all in kept]
    sizes, threads = into_EMN.shape, torch.get_num_threads()
    code.mythos_outers(address(into_EMN), *pointers, len(several), *sizes, not is_new, half, threads)


# -- the C code


def is_native(a: Tensor, b: Tensor, n_columns: int) -> bool:
    """Whether the C code multiplies ``a`` by ``b``, with so many columns."""
    return a.numel() * n_columns >= _ENOUGH and has_kernels(a, b)


def _run(c_MN: Tensor, a_MK: Tensor, b_KN: Tensor, scale: float, add: bool = False, half: bool = False) -> None:
    """``c = scale * a @ b`` or, with ``add``, ``c += ``."""
    code, (M, K), N, (row, column) = kernels(), a_MK.shape, b_KN.shape[1], b_KN.stride()
    assert code is not None and c_MN.stride(1) == 1
    code.mythos_product(
        c_MN.data_ptr(), c_MN.stride(0), a_MK.data_ptr(), *a_MK.stride(), b_KN.data_ptr(), column, row, M, N, K,
        scale, add, half, torch.get_num_threads(),
    )  # fmt: skip
