"""Every backend on a GPU against float64: values and gradients over a grid of shapes, and any shapes.

Run by `make test-gpu`, which prints the worst errors (as shares of the largest entry) at the end.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_decode_attention as decode_cases
import test_folded
import test_gated_scan_kernel as scan_cases
from hypothesis import given, settings, strategies as st

from conftest import BFLOAT16, GRADIENT, OPERATION, WORST
from pallas_kernels import decode_attention, dilated_attention, gated_scan
from pallas_kernels.decode_attention import reference
from pallas_kernels.decode_attention.arg_specs import ArgSpec
from pallas_kernels.dilated_attention.folded import Pattern
from pallas_kernels.softmax import NOTHING

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU")]
VALUES = {"float32": OPERATION, "bfloat16": BFLOAT16}
GRADIENTS = {"float32": GRADIENT, "bfloat16": BFLOAT16}


@pytest.fixture(autouse=True)
def _true_float32():
  with jax.default_matmul_precision("highest"):
    yield


def compare(ours, theirs, bound, *of):
  """Notes and bounds the largest error, as a share of the largest entry of the other."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape
  assert np.isfinite(ours).all(), of
  error = float(np.abs(ours - theirs).max(initial=0) / max(np.abs(theirs).max(initial=0), 1e-30))
  WORST[of] = max(error, WORST.get(of, 0.0))
  assert error <= bound, (of, error)


def in_float64(f, arguments, cotangents):
  """(values, gradients) of f in float64, by the processor: it compiles sooner, and is another implementation."""
  with jax.enable_x64(), jax.default_device(jax.devices("cpu")[0]):
    wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), (arguments, cotangents))
    values, pull = jax.vjp(f, *wide[0])
    return jax.tree.map(np.asarray, (values, pull(wide[1])))


def recurrence(logits, inputs, state, reset):
  """`gated_scan` in the type of its arguments."""
  decay, write = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
  if reset is not None:
    decay = jnp.where(reset.reshape(reset.shape + (1,) * (logits.ndim - 2)), 0, decay)

  def step(h, at):
    new = tuple(at[0] * one + at[1] * x for one, x in zip(h, at[2], strict=True))
    return new, new

  time_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (decay, write, inputs))
  last, out = jax.lax.scan(step, state, time_first)
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out), last


def check_scan(implementation, shape, dtype, reset=False, inputs=2, seed=0):
  logits, x, state, resets = scan_cases.draw(shape, dtype, reset, inputs, seed)
  cotangents = scan_cases.draw(shape, dtype, inputs=inputs, seed=seed + 1)[1:3]
  values, pull = jax.jit(lambda *a: jax.vjp(
      lambda *b: gated_scan(*b, resets, implementation=implementation), *a))(logits, x, state)
  gradients = jax.jit(lambda pull, d: pull(d))(pull, cotangents)
  expected = in_float64(lambda *a: recurrence(*a, resets), (logits, x, state), cotangents)
  for kind, bound, ours, theirs in (("values", VALUES[dtype], values, expected[0]),
                                    ("gradients", GRADIENTS[dtype], gradients, expected[1])):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      compare(one, other, bound, "gated_scan", implementation, dtype, kind)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize(("shape", "how"), [
    ((2, 1, 1, 64), {}), ((1, 37, 3, 64), dict(reset=True)), ((2, 128, 2, 128), {}), ((1, 8192, 1, 64), {}),
    ((1, 1000, 4, 128), dict(reset=True)), ((3, 513, 1, 256), dict(inputs=1)), ((8, 1024, 16, 128), dict(reset=True))])
def test_gated_scan(implementation, shape, how, dtype):
  check_scan(implementation, shape, dtype, **how)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 600), st.integers(1, 5), st.sampled_from([8, 64, 96]), st.booleans(),
       st.integers(0, 9))
def test_gated_scan_of_any_shape(batch, length, heads, width, reset, seed):
  check_scan("mosaic_gpu", (batch, length, heads, width), "float32", reset, 2, seed)


def check_dilated(implementation, dtype, length, pattern, heads, groups, width, seed=0):
  rng = np.random.default_rng(seed)
  q, d = (jnp.asarray(rng.standard_normal((2, length, heads * groups, width)), dtype) for _ in range(2))
  k, v = (jnp.asarray(rng.standard_normal((2, length, heads, width)), dtype) for _ in range(2))
  pattern = Pattern(*pattern)
  attend = functools.partial(dilated_attention, **pattern._asdict(), implementation=implementation)
  values, pull = jax.jit(functools.partial(jax.vjp, attend))(q, k, v)
  gradients = jax.jit(lambda pull, d: pull(d))(pull, d)
  expected = in_float64(lambda *a: test_folded.expected(*a, pattern), (q, k, v), d)
  of = ("dilated_attention", implementation, dtype)
  for ours in (values, jax.jit(attend)(q, k, v)):  # under a gradient another kernel may run
    compare(ours, expected[0], VALUES[dtype], *of, "values")
  for ours, theirs in zip(gradients, expected[1], strict=True):
    compare(ours, theirs, GRADIENTS[dtype], *of, "gradients")


DILATED = [  # tokens, (D, W, S0), key/value heads, query heads of each, width
    (257, (16, 0, 0), 1, 1, 64), (250, (16, 0, 4), 2, 1, 128), (9, (16, 0, 0), 2, 2, 64), (300, (4, 17, 9), 2, 3, 64),
    (128, (64, 256, 4), 2, 1, 128), (512, (1, 0, 0), 2, 1, 128), (511, (None, 40, 4), 1, 4, 64),
    (384, (64, 0, 70), 2, 1, 128), (1024, (16, 32, 0), 4, 2, 128), (1, (None, 1, 0), 1, 1, 64),
    (30, (16, 0, 0), 2, 1, 64)]


@pytest.mark.parametrize(("implementation", "dtype"), [("xla", "float32"), ("xla", "bfloat16"), ("cudnn", "bfloat16"),
                                                       ("mosaic_gpu", "bfloat16")])
@pytest.mark.parametrize(("length", "pattern", "heads", "groups", "width"), DILATED)
def test_dilated_attention(implementation, dtype, length, pattern, heads, groups, width):
  check_dilated(implementation, dtype, length, pattern, heads, groups, width)


def test_plain_jax_alone_takes_wide_heads():
  case = (250, (16, 3, 4), 2, 2, 256)
  for dtype in ("float32", "bfloat16"):
    check_dilated("xla", dtype, *case)
  for implementation in ("cudnn", "cudnn_masked", "mosaic_gpu"):
    reason = f"'{implementation}' of dilated_attention takes heads .* wide, these are 256"
    with pytest.raises(NotImplementedError, match=reason):
      check_dilated(implementation, "bfloat16", *case)


@pytest.mark.parametrize(("length", "pattern", "heads", "groups", "width"), [
    (2, (16, 0, 1), 1, 1, 64), (3, (16, 0, 1), 1, 1, 64),
    # Of 1 and of 9 tokens each sees itself alone: queries and keys have no gradient for an error to be a share of.
    *(one for one in DILATED if one[0] not in (1, 9))])
def test_dilated_attention_under_a_mask(length, pattern, heads, groups, width):
  check_dilated("cudnn_masked", "bfloat16", length, pattern, heads, groups, width)


@pytest.mark.parametrize(("length", "pattern", "heads", "groups", "width"), [
    (512, (4, 0, 5), 1, 2, 128), (768, (2, 3, 0), 1, 4, 128), (1024, (64, 300, 60), 2, 1, 64),
    (4096, (16, 0, 4), 2, 2, 128), (2048, (8, 40, 30), 2, 1, 64)])
def test_dilated_attention_of_many_tiles(length, pattern, heads, groups, width):
  check_dilated("mosaic_gpu", "bfloat16", length, pattern, heads, groups, width)


@pytest.mark.parametrize("implementation", ["cudnn", "mosaic_gpu"])
@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 40)), st.integers(0, 60), st.integers(0, 20),
       st.sampled_from([(1, 1), (2, 3)]), st.sampled_from([64, 128]), st.integers(0, 9))
def test_dilated_attention_of_any_shape(implementation, length, dilation, window, sinks, heads, width, seed):
  check_dilated(implementation, "bfloat16", length, (dilation, window, sinks), *heads, width, seed)


def compare_parts(ours, expected, bound, *of):
  """Of (out, lse) of decode attention; `bound` is that of values."""
  (out, lse), (expected_out, expected_lse) = ours, expected
  empty = expected_lse == NOTHING
  compare(out, expected_out, bound, *of, "values")
  np.testing.assert_array_equal(np.asarray(out)[empty], 0)
  np.testing.assert_array_equal(np.asarray(lse) == np.float32(NOTHING), empty)
  compare(np.where(empty, 0, lse), np.where(empty, 0, expected_lse), OPERATION, *of, "log-sum-exp")


def check_decode(implementation, shape, per_head=False, seed=0):
  q, keys, values, visible = decode_cases.draw(shape, seed, per_head=per_head)
  keys, values = decode_cases.poison(keys, values, visible)
  run = jax.jit(functools.partial(decode_attention, implementation=implementation))
  of = ("decode_attention", implementation, shape.dtype)
  rounded = implementation == "xla" and shape.dtype == "bfloat16" and shape.heads > shape.kv_heads
  compare_parts(run(q, keys, values, visible), reference.decode_attention(q, keys, values, visible),
                BFLOAT16 if rounded else OPERATION, *of)
  own, whole = decode_cases.draw_own(shape, (keys, values, visible))
  for kind, bound, ours, theirs in zip(("values", "log-sum-exp"), (BFLOAT16 if rounded else OPERATION, OPERATION),
                                       run(q, keys, values, visible, own=own),
                                       reference.decode_attention(q, *whole), strict=True):
    compare(ours, theirs, bound, *of, kind)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize(("shape", "per_head"), [
    ((1, 1, 1, 1, 64), False), ((2, 37, 2, 2, 64), False), ((3, 65, 4, 4, 128), False), ((2, 257, 8, 2, 128), True),
    ((2, 77, 12, 2, 64), False), ((2, 33, 5, 1, 256), False), ((1, 4097, 8, 8, 128), False),
    ((64, 257, 32, 32, 128), False)])
def test_decode_attention(implementation, shape, per_head, dtype):
  check_decode(implementation, ArgSpec(*shape, dtype), per_head)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize(("shape", "block", "chosen", "apart"), [
    ((2, 90, 2, 2, 128), 16, 3, False), ((2, 1000, 8, 2, 128), 128, 5, False), ((1, 700, 8, 2, 64), 16, 20, True),
    ((2, 50, 4, 2, 256), 8, 5, True), ((64, 1024, 32, 32, 128), 64, 4, False)])
def test_decode_attention_of_chosen_blocks(implementation, shape, block, chosen, apart, dtype):
  shape = ArgSpec(*shape, dtype)
  q, keys, values, visible, blocks = decode_cases.draw_blocks(shape, block, chosen, apart)
  run = jax.jit(functools.partial(decode_attention, implementation=implementation))
  rounded = implementation == "xla" and dtype == "bfloat16" and shape.heads > shape.kv_heads and not apart
  compare_parts(run(q, keys, values, visible, blocks=blocks),
                reference.decode_attention(q, keys, values, visible, blocks), BFLOAT16 if rounded else OPERATION,
                "decode_attention, blocks", implementation, dtype)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 700), st.sampled_from([(1, 1), (4, 4), (6, 2), (16, 1)]),
       st.sampled_from([64, 128, 256]), st.booleans(), st.integers(0, 9))
def test_decode_attention_of_any_shape(batch, rows, heads, width, per_head, seed):
  check_decode("mosaic_gpu", ArgSpec(batch, rows, *heads, width, "bfloat16"), per_head, seed)


def test_models_side_by_side():
  """Under vmap: what trains several seeds in one program."""
  logits, (x, state), _, _ = scan_cases.draw((3, 2, 256, 64), "float32")
  of_all = {name: jax.jit(jax.vmap(lambda one, x, h, name=name: gated_scan(one, (x,), (h,), implementation=name)))(
      logits, x, state[:, :, 0]) for name in ("xla", "mosaic_gpu")}
  for ours, theirs in zip(jax.tree.leaves(of_all["mosaic_gpu"]), jax.tree.leaves(of_all["xla"]), strict=True):
    compare(ours, theirs, OPERATION, "gated_scan", "mosaic_gpu", "float32", "values")


@pytest.mark.parametrize("implementation", ["cudnn", "cudnn_masked", "mosaic_gpu"])
def test_attention_of_models_side_by_side(implementation):
  """Queries of three models, one of keys: as one after another."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((*lead, 2, 300, heads, 64)), jnp.bfloat16)
             for lead, heads in (((3,), 4), ((), 2), ((), 2)))
  attend = functools.partial(dilated_attention, dilation=16, sinks=4, implementation=implementation)
  loss = lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32)**2)
  f = jax.grad(loss, argnums=(0, 1, 2))
  together = jax.jit(jax.vmap(f, in_axes=(0, None, None)))(q, k, v)
  for i in range(3):
    for ours, theirs in zip(together, jax.jit(f)(q[i], k, v), strict=True):
      compare(ours[i], theirs, BFLOAT16, "dilated_attention, mapped", implementation, "bfloat16", "gradients")
