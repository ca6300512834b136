"""Operations on sequences that a mesh cuts, in a process of eight devices: values and gradients of one device.

Run by `test_over_context.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from conftest import GRADIENT, OPERATION, assert_close
from pallas_kernels import decode_attention, dilated_attention, gated_scan
from rat_jax.parallel import make_mesh

P = jax.P
RANDOM = np.random.default_rng(0)


def normal(*shape):
  return RANDOM.standard_normal(shape).astype(np.float32)


def check(f, arguments, mesh, specs):
  """Compares f of arrays on a mesh, and its gradient by all of them, with one device."""
  def loss(*arguments):
    values = f(*arguments)
    weights = np.random.default_rng(7)
    weighted = [jnp.sum(x * weights.standard_normal(x.shape).astype(np.float32)) for x in jax.tree.leaves(values)]
    return sum(weighted), values

  both = jax.jit(jax.grad(loss, argnums=tuple(range(len(arguments))), has_aux=True))
  placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arguments, specs, strict=True)]
  (theirs, values), (ours, found) = both(*arguments), both(*placed)
  for bound, one, other in ((GRADIENT, ours, theirs), (OPERATION, found, values)):
    for x, y in zip(*map(jax.tree.leaves, (one, other)), strict=True):
      assert_close(x, y, bound)


def scans(mesh):
  for length in (16, 21, 3):  # 21 is no multiple of the pieces, 3 is less than some have
    reset = RANDOM.random((4, length)) < 0.2
    check(lambda g, x, y, s, reset=reset: gated_scan(g, (x, y), (s, 2 * s), reset),
          (*(normal(4, length, 4, 8) for _ in range(3)), normal(4, 4, 8)), mesh, [P("data")] * 4)
  # Sequences that lie cut over another axis: no piece of them is scanned by itself.
  gate, x = normal(4, 16, 4, 8), normal(4, 16, 4, 8)
  for spec in (P(None, "data"), P(None, ("data", "context"))):
    placed = [jax.device_put(one, NamedSharding(mesh, spec)) for one in (gate, x)]
    assert_close(gated_scan(placed[0], placed[1:])[0][0], gated_scan(gate, [x])[0][0], OPERATION)


def dilated(mesh):
  """Pieces that dilation divides and others, windows over several pieces, more sinks than a piece has."""
  for length, dilation, window, sinks in ((64, 4, 3, 2), (62, 8, 5, 3), (64, None, 7, 4), (64, 16, 0, 0),
                                          (96, 8, 40, 3), (64, 16, 1, 20), (12, 8, 1, 1)):
    f = lambda q, k, v, d=dilation, w=window, s=sinks: dilated_attention(q, k, v, dilation=d, window=w, sinks=s)
    check(f, (normal(4, length, 4, 8), normal(4, length, 2, 8), normal(4, length, 2, 8)), mesh, [P("data")] * 3)
  segments = np.sort(RANDOM.integers(0, 4, (4, 64)), axis=1)[:, ::-1].astype(np.int32)
  check(lambda q, k, v: dilated_attention(q, k, v, dilation=4, window=3, sinks=2, segment_ids=segments),
        (normal(4, 64, 4, 8), normal(4, 64, 2, 8), normal(4, 64, 2, 8)), mesh, [P("data")] * 3)


def decoding(mesh):
  """With a mask over all rows, with the token's own key, and with chosen blocks."""
  arguments = (normal(4, 4, 8), normal(2, 4, 2, 24, 8), normal(2, 4, 2, 24, 8))
  specs = [P("data"), P(None, "data"), P(None, "data")]
  visible, own = RANDOM.random((4, 24)) < 0.5, (normal(4, 2, 8), normal(4, 2, 8))
  for rest in ({}, {"own": own}):
    check(lambda q, k, v, rest=rest: decode_attention(q, k, v, visible, layer=1, **rest)[0], arguments, mesh, specs)
  blocks = np.stack([RANDOM.permutation(6)[:3] for _ in range(8)]).reshape(4, 2, 3).astype(np.int32)
  seen = RANDOM.random((4, 2, 3, 4)) < 0.7
  check(lambda q, k, v: decode_attention(q, k, v, seen, layer=1, blocks=blocks)[0], arguments, mesh, specs)


def main():
  assert jax.device_count() == 8
  for text in ("data:2,tensor:2,context:2", "tensor:4,context:2", "context:8"):
    mesh = make_mesh(text)
    for operation in (scans, dilated, decoding):
      operation(mesh)
      print(f"{text}: {operation.__name__}", flush=True)


if __name__ == "__main__":
  main()
