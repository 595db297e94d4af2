"""What the factors of a scan's products are: whole numbers of the precision, or narrower ones (`half`, `int8`).

Narrow factors lie in rows and in panels of their own forms. `x` is rounded before the scan (`round_matrix`), what is
fed back before each step, and weights where they are packed (`pack_layer`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from nbrnn.kernels import half, half_gemm, int8, tiles
from nbrnn.kernels.constants import Constants
from nbrnn.kernels.gemm import pack_bias
from nbrnn.kernels.jit import Kernel, jitable
from nbrnn.kernels.simd import lanes_of, load, pointer, shift


@dataclass(frozen=True)
class Products(Constants):
    """A kind of factors: functions for compiled code, and what Python needs to prepare their memory.

    Parameters
    ----------
    name : str
        Tells it apart, also from other kernels for the same numbers.
    number : numpy.generic
        Any number as factors hold it.
    group : int
        Numbers of the depth that lie side by side in a panel.
    kernel : callable
        ``kernel(vectors)``: the address of the kernel for panels of so many vectors.
    padded : callable
        ``padded(depth)``: the depth filled up as products want it.
    row, column : callable
        ``row(depth)``: numbers in a row of a first factor; ``column(depth)``: in a column of a panel.
    token_row : callable
        ``token_row(panel, depth, columns, token, c)``: one vector of row `token` of a panel, from column c on.
    round_rows : callable or None
        ``round_rows(source, stride, rows, step, piece, pieces, out, ld)``: round the pieces of some rows, `piece`
        numbers long and `step` apart, and put them side by side; None: nothing is rounded.
    pack_rows : callable or None
        ``pack_rows(s, shards, weight, order, out)``, as `gemm.pack_rows` does it.
    """

    name: str
    number: np.generic
    group: int
    kernel: Callable
    padded: Callable
    row: Callable
    column: Callable
    token_row: Callable
    round_rows: Callable | None = None
    pack_rows: Callable | None = None

    @property
    def narrow(self) -> int:
        """Whether factors are rounded."""
        return int(self.round_rows is not None)

    def panels(self, count: int, depth: int, columns: int) -> tuple[int, ...]:
        """The shape of panels: [count, depth, columns], narrow ones with a group behind that."""
        shape = count, self.column(depth) // self.group, columns, self.group
        return shape if self.narrow else shape[:3]


# ------------------------------------------------------------------ the kinds


@jitable
def _same(depth):
    return depth


@jitable
def _token_row(panel, depth, columns, token, c):
    return load(shift(panel, token * columns + c), lanes_of(panel))


@cache
def _whole(dtype: np.dtype) -> Products:
    """Factors of the precision."""
    kernel = partial(tiles.product_kernel, dtype=dtype)
    return Products(dtype.name, dtype.type(0), 1, kernel, _same, _same, _same, _token_row)


HALF = Products(
    f"half-{half.KIND}", np.uint16(0), 2, half.product_kernel, half.padded, half.padded, half.padded,
    half_gemm.token_row, half_gemm.round_rows, half_gemm.pack_rows,
)  # fmt: skip
INT8 = Products(
    f"int8-{int8.KIND}", np.int8(0), 4, int8.product_kernel, int8.padded, int8.row, int8.column, int8.token_row,
    int8.round_rows, int8.pack_rows,
)  # fmt: skip
NARROW = {"bfloat16": HALF, "int8": INT8}


def products_of(name: str | None, dtype: np.dtype) -> Products:
    """The kind of a name, which None is for whole numbers."""
    return _whole(np.dtype(dtype)) if name is None else NARROW[name]


# ------------------------------------------------------------------ kernels of any narrow kind


@cache
def round_matrix(products: Products) -> Kernel:
    """`round_rows` of a whole matrix: (source [M, .], first column, step, piece, pieces, out [>= M, row])."""
    return Kernel(_round_matrix, f"round_matrix-{products.name}", products)


@jitable
def _round_matrix(s, shards, products, source, first, step, piece, pieces, out):
    lo, hi = len(source) * s // shards, len(source) * (s + 1) // shards
    ld, ld_out = source.shape[1], out.shape[1]
    left = pointer(source, lo * ld + first)
    products.round_rows(left, ld, hi - lo, step, piece, pieces, pointer(out, lo * ld_out), ld_out)


@cache
def pack_layer(products: Products) -> Kernel:
    """`gemm.pack_layer` of a cell with one product."""
    return Kernel(_pack_layer, f"pack_layer-{products.name}", products)


@jitable
def _pack_layer(s, shards, products, w_ih, order_ih, out_ih, w_hh, order_hh, out_hh, bias_ih, bias_hh, first, bias):
    J = len(bias)
    bias[J * s // shards : J * (s + 1) // shards] = 0.0
    products.pack_rows(s, shards, w_ih, order_ih, out_ih)
    products.pack_rows(s, shards, w_hh, order_hh, out_hh)
    if len(bias_ih):
        pack_bias(s, shards, bias_ih, order_ih, 0, bias)
    if len(bias_hh):
        pack_bias(s, shards, bias_hh, order_hh, first, bias)
