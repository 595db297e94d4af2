"""What is left of a call beside packing, scan and products: rows brought to another place, own parameters, and a sum.

Each is little work, but a stage of it costs less than the way back to Python would.
"""

from __future__ import annotations

from nbrnn.kernels.activations import exp
from nbrnn.kernels.jit import sharded
from nbrnn.kernels.simd import lanes_of, load, pointer, store


@sharded
def copy_rows(s, shards, N, count, x, rows, column, out, places, start, add):
    """out[places[n], start + c] = x[rows[n], column + c] for the first `count` numbers c, or with `add` added to it.

    x: [., ldx]; out: [., ldo]; rows, places: [N], empty for the first N.
    """
    W, ldx, ldo = lanes_of(pointer(out, 0)), x.shape[1], out.shape[1]
    for n in range(N * s // shards, N * (s + 1) // shards):
        source = (rows[n] if len(rows) else n) * ldx + column
        target = (places[n] if len(places) else n) * ldo + start
        for c in range(0, count, W):
            value, here = load(pointer(x, source + c), count - c), pointer(out, target + c)
            store(here, load(here, count - c) + value if add else value, count - c)


@sharded
def clear(s, shards, out):
    """out = 0; out: [N]."""
    N = len(out)
    out[N * s // shards : N * (s + 1) // shards] = 0.0


@sharded
def pack_own(s, shards, values, exponent, out):
    """out[r, :H] = values[r], or the exponential of `exponent` times that, unless it is 0; values: [R, H]."""
    (R, H), W = values.shape, lanes_of(pointer(out, 0))
    for r in range(R):
        for c in range(0, H, W):
            value, here = load(pointer(values, r * H + c), H - c), pointer(out, r * out.shape[1] + c)
            store(here, value if exponent == 0.0 else exp(value * exponent), H - c)


@sharded
def own_gradient(s, shards, down, own, exponent, out):
    """out[r] = the sum over the batch of down[r], times what the exponential of `pack_own` has as its derivative.

    down: [R, B, .]; own: [R, .], the exponentials; out: [R, H].
    """
    (R, B, ld), H, W = down.shape, out.shape[1], lanes_of(pointer(out, 0))
    blocks = (H + W - 1) // W
    for r in range(R):
        for c in range(blocks * s // shards * W, blocks * (s + 1) // shards * W, W):
            total = load(pointer(down, r * B * ld + c), H - c if B > 0 else 0)
            for m in range(1, B):
                total += load(pointer(down, (r * B + m) * ld + c), H - c)
            if exponent != 0.0:  # d exp(k p) = k exp(k p) dp
                total = total * load(pointer(own, r * ld + c), H - c) * exponent
            store(pointer(out, r * H + c), total, H - c)


@sharded
def add_up(s, shards, parts, total):
    """total[0] = the sum of parts, one after the other."""
    found = 0.0
    for n in range(len(parts)):
        found += parts[n]
    total[0] = found
