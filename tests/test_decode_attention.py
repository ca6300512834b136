"""Decode attention: every implementation against float64, what must not reach a result, and what is refused.

The GPU kernel runs here in Pallas' interpreter, and is lowered for CUDA at the shapes that benchmarks time.
"""

from __future__ import annotations

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from conftest import BFLOAT16, GRADIENT, OPERATION, assert_close
from gpu_interpreter import InterpretParams
from pallas_kernels import decode_attention, softmax
from pallas_kernels.decode_attention import api, mosaic_gpu, reference, xla
from pallas_kernels.decode_attention.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.decode_attention.mosaic_gpu_shapes import Cut, Tuning


def draw(shape, seed=0, share=0.6, per_head=False):
  """q, keys, values and visible of a shape; rows are ragged, the last of several sees nothing."""
  rng = np.random.default_rng(seed)
  q, keys, values = (rng.standard_normal(x.shape).astype(x.dtype) for x in shape.types()[:3])
  visible = rng.random((shape.batch, *((shape.kv_heads,) if per_head else ()), shape.rows)) < share
  if shape.batch > 1:
    visible[0, ..., shape.rows * 2 // 3:] = False
    visible[-1] = False
  return q, keys, values, visible


def poison(keys, values, visible):
  """Keys and values with what is not visible made NaN."""
  seen = (visible[:, None] if visible.ndim == 2 else visible)[..., None]
  return (np.where(seen, x, np.nan).astype(x.dtype) for x in (keys, values))


def check(implementation, q, keys, values, visible, relative=OPERATION):
  assert_same_part(implementation(q, keys, values, visible), reference.decode_attention(q, keys, values, visible),
                   relative)


def assert_same_part(ours, expected, relative):
  (out, lse), (expected_out, expected_lse) = ours, expected
  assert out.dtype == lse.dtype == jnp.float32
  empty = expected_lse == softmax.NOTHING
  assert_close(out, expected_out, relative, "output")
  np.testing.assert_array_equal(np.asarray(out)[empty], 0)
  np.testing.assert_array_equal(np.asarray(lse)[empty], np.float32(softmax.NOTHING))
  assert_close(np.where(empty, 0, lse), np.where(empty, 0, expected_lse), relative, "log-sum-exp")


def interpreted(shape, tuning=None):
  """The kernel without a GPU. Shared memory starts as NaN there, and a race is an error."""
  run = jax.jit(functools.partial(mosaic_gpu.decode_attention, tuning=tuning,
                                  interpret=InterpretParams(detect_races=True)))
  return lambda *arguments: run(*map(jnp.asarray, arguments))


plain = jax.jit(xla.decode_attention)


@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([(1, 1), (4, 4), (6, 2)]), st.sampled_from([8, 64]),
       st.sampled_from(["float32", "bfloat16"]), st.booleans(), st.integers(0, 9))
@settings(deadline=None, max_examples=15)
def test_plain_jax_equals_the_reference(batch, rows, heads, width, dtype, per_head, seed):
  q, keys, values, visible = draw(ArgSpec(batch, rows, *heads, width, dtype), seed, per_head=per_head)
  keys, values = poison(keys, values, visible)
  # Grouped heads have their weights in the type of the values.
  relative = BFLOAT16 if dtype == "bfloat16" and heads[0] > heads[1] else OPERATION
  check(plain, q, keys, values, visible, relative)


@pytest.mark.parametrize("shape", [ArgSpec(1, 257, 1, 1, 256), ArgSpec(2, 1, 2, 2, 128),
                                   ArgSpec(2, 65, 8, 1, 64, "float32")], ids=str)
def test_plain_jax_at_the_kernels_widths(shape):
  q, keys, values, visible = draw(shape)
  keys, values = poison(keys, values, visible)
  check(plain, q, keys, values, visible, BFLOAT16 if shape.dtype == "bfloat16" else OPERATION)


@pytest.mark.parametrize(("shape", "tuning"), [
    (ArgSpec(2, 1, 1, 1, 128), None),                                    # one row, less than the threads take at a time
    (ArgSpec(2, 37, 2, 2, 64), Tuning(tile_rows=16)),                    # tiles that do not divide the rows
    (ArgSpec(3, 19, 2, 1, 128), Tuning(tile_rows=8, stages=3)),          # grouped heads; a row without a tile to read
    (ArgSpec(2, 33, 5, 1, 256), Tuning(tile_rows=12, splits=2)),         # a group that is cut into blocks; two splits
    (ArgSpec(1, 30, 2, 2, 128, "float32"), Tuning(tile_rows=4, stages=1, splits=3)),
    (ArgSpec(2, 9, 1, 1, 256, "float32"), None),
    (ArgSpec(2, 21, 3, 1, 64, "float32"), Tuning(tile_rows=8)),
], ids=str)
def test_the_kernel_equals_the_reference(shape, tuning):
  q, keys, values, visible = draw(shape)
  keys, values = poison(keys, values, visible)
  check(interpreted(shape, tuning), q, keys, values, visible)


def test_the_kernel_takes_a_mask_for_every_head():
  shape = ArgSpec(2, 20, 4, 2, 64)
  q, keys, values, visible = draw(shape, per_head=True)
  visible[0, 1] = False
  keys, values = poison(keys, values, visible)
  check(interpreted(shape, Tuning(tile_rows=16)), q, keys, values, visible)


def draw_own(shape, cache):
  """Key and value [B, K, H] of the new token, of a large score in the first row; and cache and mask with them."""
  keys, values, visible = cache
  rng = np.random.default_rng(1)
  own = [rng.standard_normal((shape.batch, shape.kv_heads, shape.width)).astype(keys.dtype) for _ in range(2)]
  own[0][0] *= 100
  whole = (np.concatenate([x, one[:, :, None]], axis=2) for x, one in zip((keys, values), own, strict=True))
  return tuple(own), (*whole, np.pad(visible, ((0, 0),) * (visible.ndim - 1) + ((0, 1),), constant_values=True))


@pytest.mark.parametrize(("implementation", "shape"), [
    ("xla", ArgSpec(3, 17, 6, 2, 64)), ("xla", ArgSpec(2, 9, 2, 2, 128, "float32")),
    ("mosaic_gpu", ArgSpec(3, 19, 2, 1, 128)), ("mosaic_gpu", ArgSpec(2, 33, 5, 1, 64, "float32"))], ids=str)
def test_the_own_key_is_one_more_row_of_the_cache(implementation, shape):
  """Also where nothing of the cache is seen, in several splits, and where its score is far above the others."""
  q, keys, values, visible = draw(shape)
  keys, values = poison(keys, values, visible)
  own, whole = draw_own(shape, (keys, values, visible))
  run = xla.decode_attention if implementation == "xla" else functools.partial(
      mosaic_gpu.decode_attention, tuning=Tuning(tile_rows=8, splits=2), interpret=InterpretParams(detect_races=True))
  out, lse = jax.jit(run)(*map(jnp.asarray, (q, keys, values, visible)), own=own)
  relative = BFLOAT16 if implementation == "xla" and shape.dtype == "bfloat16" else OPERATION
  for one, other in zip((out, lse), reference.decode_attention(q, *whole), strict=True):
    assert_close(one, other, relative)


@pytest.mark.parametrize("implementation", [xla.decode_attention, functools.partial(
    mosaic_gpu.decode_attention, interpret=InterpretParams())], ids=["xla", "mosaic_gpu"])
def test_one_layer_of_a_cache_of_several(implementation):
  q, keys, values, visible = draw(ArgSpec(2, 10, 2, 1, 64, "float32"))
  keys, values = (np.stack([np.full_like(x, np.nan), x, np.full_like(x, np.nan)]) for x in (keys, values))
  out, _ = jax.jit(implementation)(*map(jnp.asarray, (q, keys, values, visible)), layer=jnp.int32(1))
  assert_close(out, reference.decode_attention(q, keys[1], values[1], visible)[0], OPERATION)


def draw_blocks(shape, block, chosen, apart=False, seed=0):
  """q, keys, values, visible and blocks, these in any order; what no head sees is NaN, the last row sees nothing."""
  rng = np.random.default_rng(seed)
  q, keys, values, _ = draw(shape, seed)
  heads, count = shape.heads if apart else shape.kv_heads, -(-shape.rows // block)
  blocks = np.stack([rng.permutation(count)[:chosen] for _ in range(shape.batch * heads)])
  blocks = blocks.reshape(shape.batch, heads, -1).astype(np.int32)
  visible = rng.random((*blocks.shape, block)) < 0.7
  visible &= blocks[..., None] * block + np.arange(block) < shape.rows
  visible[0, 0, chosen // 2:], blocks[0, 0, chosen // 2:] = False, count + 5
  if shape.batch > 1:
    visible[-1] = False
  seen = reference.rows_of_blocks(visible, blocks, shape.rows)
  keys, values = poison(keys, values, seen.reshape(shape.batch, shape.kv_heads, -1, shape.rows).any(axis=2))
  return q, keys, values, visible, blocks


def check_blocks(run, drawn, own=None, relative=OPERATION):
  q, keys, values, visible, blocks = drawn
  ours = jax.jit(run)(*map(jnp.asarray, (q, keys, values, visible)), blocks=jnp.asarray(blocks), own=own)
  seen = reference.rows_of_blocks(visible, blocks, keys.shape[2])
  if own is not None:
    keys, values = (np.concatenate([x, one[:, :, None]], axis=2) for x, one in zip((keys, values), own, strict=True))
    seen = np.pad(seen, ((0, 0), (0, 0), (0, 1)), constant_values=True)
  assert_same_part(ours, reference.decode_attention(q, keys, values, seen), relative)


@given(st.integers(1, 2), st.integers(1, 40), st.sampled_from([(1, 1), (4, 4), (6, 2)]), st.integers(1, 9),
       st.integers(1, 6), st.booleans(), st.integers(0, 9))
@settings(deadline=None, max_examples=15)
def test_plain_jax_reads_chosen_blocks(batch, rows, heads, block, chosen, apart, seed):
  shape = ArgSpec(batch, rows, *heads, 8, "float32")
  check_blocks(xla.decode_attention, draw_blocks(shape, block, min(chosen, -(-rows // block)), apart, seed))


@pytest.mark.parametrize(("shape", "block", "chosen", "apart", "tuning"), [
    (ArgSpec(2, 90, 2, 2, 128), 16, 3, False, None),                                # the cache ends within a block
    (ArgSpec(2, 64, 4, 2, 128), 32, 2, False, Tuning(tile_rows=16, stages=3)),      # blocks of two tiles, grouped heads
    (ArgSpec(1, 70, 4, 2, 64), 16, 4, True, Tuning(splits=2)),                      # query heads that choose apart
    (ArgSpec(2, 10, 1, 1, 128, "float32"), 16, 1, False, None),                     # a cache smaller than a block
    (ArgSpec(2, 50, 2, 1, 256), 8, 5, True, None),
], ids=str)
def test_the_kernel_reads_chosen_blocks(shape, block, chosen, apart, tuning):
  run = functools.partial(mosaic_gpu.decode_attention, tuning=tuning, interpret=InterpretParams(detect_races=True))
  check_blocks(run, draw_blocks(shape, block, chosen, apart))


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_the_own_key_beside_chosen_blocks(implementation):
  shape = ArgSpec(2, 40, 4, 2, 64, "float32")
  rng = np.random.default_rng(3)
  own = tuple(rng.standard_normal((2, 2, 64)).astype(np.float32) for _ in range(2))
  run = xla.decode_attention if implementation == "xla" else functools.partial(
      mosaic_gpu.decode_attention, interpret=InterpretParams())
  for apart in (False, True):
    arguments = draw_blocks(shape, 8, 3, apart)
    check_blocks(run, arguments, own)
    # The second of three layers, the others not finite.
    of_layer = lambda q, keys, values, visible, **rest: run(q, *(jnp.full((3, *x.shape), jnp.nan).at[1].set(x)
                                                                 for x in (keys, values)), visible, layer=1, **rest)
    check_blocks(of_layer, arguments, own)


def test_the_kernel_with_large_scores():
  shape = ArgSpec(1, 20, 1, 1, 64, "float32")
  q, keys, values, visible = draw(shape)
  check(interpreted(shape, Tuning(tile_rows=8)), q * 300, keys, values, visible, 1e-4)


@pytest.mark.parametrize("implementation", [plain, interpreted(None)], ids=["xla", "mosaic_gpu"])
def test_what_is_not_finite_stays_in_its_row(implementation):
  q, keys, values, visible = draw(ArgSpec(3, 6, 2, 2, 64))
  visible[:] = True
  clean, _ = implementation(q, keys, values, visible)
  q[1], keys[1], values[1] = np.nan, np.inf, np.nan
  out, lse = implementation(q, keys, values, visible)
  np.testing.assert_array_equal(np.asarray(out)[[0, 2]], np.asarray(clean)[[0, 2]])
  assert np.isfinite(np.asarray(lse)[[0, 2]]).all()
  assert np.isnan(np.asarray(out)[1]).all()


def test_own_token_and_cache_merge_to_one_softmax():
  shape = ArgSpec(2, 12, 4, 2, 8, "float32")
  q, keys, values, visible = draw(shape)
  seen = visible.copy()
  seen[:, 11] = True  # the new token
  visible[:, 11] = False
  out, lse = jax.jit(decode_attention)(q, keys, values, visible)
  own = softmax.attend_part(q[:, None], keys[:, None, :, 11], values[:, None, :, 11], np.ones((2, 1, 1, 1), bool))
  merged = softmax.merge([(out[:, None], lse[:, None]), own])[:, 0]
  assert_close(merged, reference.decode_attention(q, keys, values, seen)[0], OPERATION)


def test_rows_that_see_nothing_have_finite_gradients():
  q, keys, values, visible = draw(ArgSpec(2, 5, 2, 2, 8, "float32"))

  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def gradients(q, keys, values):
    out, lse = decode_attention(q, keys, values, visible)
    return jnp.sum(out**2) + jnp.sum(jnp.where(lse == softmax.NOTHING, 0, lse))

  for gradient in jax.jit(gradients)(q, keys, values):
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[-1], 0)


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize("with_own", [False, True])
def test_the_kernel_has_the_gradient_of_plain_jax(with_own, monkeypatch):
  kernel = types.SimpleNamespace(unsupported=mosaic_gpu.unsupported,
                                 decode_attention=lambda *a: jax.lax.stop_gradient(xla.decode_attention(*a)))
  monkeypatch.setattr(api, "_mosaic_gpu", lambda: kernel)
  q, keys, values, visible = draw(ArgSpec(2, 5, 2, 1, 64, "float32"))
  keys, values = (np.stack([x, x + 1]) for x in (keys, values))
  own = (keys[0, :, :, 0], values[0, :, :, 0]) if with_own else None

  @functools.partial(jax.jit, static_argnums=4)
  @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
  def gradients(q, keys, values, own, implementation):
    out, lse = decode_attention(q, keys, values, visible, layer=jnp.int32(1), own=own, implementation=implementation)
    return jnp.sum(out**2) + jnp.sum(jnp.where(lse == softmax.NOTHING, 0, lse))

  both = (jax.tree.leaves(gradients(q, keys, values, own, name)) for name in ("mosaic_gpu", "xla"))
  for ours, theirs in zip(*both, strict=True):
    assert np.abs(ours).max() > 0
    assert_close(ours, theirs, GRADIENT)


def test_masks_set_every_visible_row_once():
  masks_of = jax.jit(mosaic_gpu._masks, static_argnums=0)
  for rows in (1, 64, 65, 130):
    for tile_rows in (8, 60):
      cut = Cut(1, 2, 2, rows, 128, jnp.dtype("bfloat16"), Tuning(tile_rows))
      visible = np.random.default_rng(rows).random((1, 1, rows)) < 0.5
      masks, count = masks_of(cut, visible)
      at = np.asarray(cut.starts())[:, None] + np.arange(cut.flags)
      np.testing.assert_array_equal(np.sort(at[np.asarray(masks[0, 0]) == 1]), np.flatnonzero(visible[0, 0]))
      assert not np.asarray(masks)[0, 0, int(count[0, 0]):].any()
      assert count[0, 0] == 0 or np.asarray(masks)[0, 0, int(count[0, 0]) - 1].any()


@pytest.mark.parametrize("shape", [*ARG_SPECS.values(), ArgSpec(1, 4097, 32, 16), ArgSpec(4, 77, 12, 2, 64),
                                   ArgSpec(2, 5, 6, 2, 256, "float32")], ids=str)
def test_the_kernel_lowers_for_cuda(shape):
  q, keys, values, visible = shape.types()
  own = (jax.ShapeDtypeStruct((*keys.shape[:2], keys.shape[3]), keys.dtype),) * 2
  for arguments in ({}, {"own": own}):
    traced = jax.jit(mosaic_gpu.decode_attention).trace(q, keys, values, visible, **arguments)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("shape", "block", "chosen", "heads"), [
    (ArgSpec(128, 16384), 64, 16, 32), (ArgSpec(128, 16400), 16, 64, 32), (ArgSpec(4, 999, 16, 2, 64), 32, 3, 16),
], ids=str)
def test_the_kernel_of_chosen_blocks_lowers_for_cuda(shape, block, chosen, heads):
  q, keys, values, _ = shape.types()
  blocks = jax.ShapeDtypeStruct((shape.batch, heads, chosen), jnp.int32)
  visible = jax.ShapeDtypeStruct((*blocks.shape, block), bool)
  traced = jax.jit(mosaic_gpu.decode_attention).trace(q, keys, values, visible, blocks=blocks)
  assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_small_batches_split_the_cache():
  splits = {batch: Cut(batch, 32, 32, 4097, 128, jnp.dtype("bfloat16"), Tuning()).splits
            for batch in (1, 4, 13, 256)}
  assert splits == {1: 13, 4: 4, 13: 1, 256: 1}
  uneven = Cut(1, 1, 1, 5 * 64, 128, jnp.dtype("bfloat16"), Tuning(splits=4))
  assert (uneven.tiles, uneven.tiles_per_split, uneven.splits) == (5, 2, 3)


LAYERS = np.zeros((3, 2, 2, 5, 8), np.float32)
OWN = LAYERS[0, :, :, 0]


@pytest.mark.parametrize(("change", "error", "message"), [
    (dict(q=np.zeros((2, 3, 4, 8), np.float32)), ValueError, r"give q \[B, N, H\]"),
    (dict(values=np.zeros((2, 2, 6, 8), np.float32)), ValueError, r"give q \[B, N, H\]"),
    (dict(q=np.zeros((3, 4, 8), np.float32)), ValueError, "B and H must be the same"),
    (dict(q=np.zeros((2, 3, 8), np.float32)), ValueError, "multiple of"),
    (dict(q=np.zeros((2, 0, 8), np.float32)), ValueError, "at least one entry"),
    (dict(q=np.zeros((2, 4, 8), jnp.bfloat16)), ValueError, "give them one floating type"),
    (dict(visible=np.zeros((2, 5), np.int32)), ValueError, r"visible is int32 \(2, 5\); give bool"),
    (dict(visible=np.zeros((2, 4, 5), bool)), ValueError, r"\[B, K, R\] = \(2, 2, 5\)"),
    (dict(layer=0), ValueError, r"\[L, B, K, R, H\], as layer is given"),
    (dict(layer=3, keys=LAYERS, values=LAYERS), ValueError, "layer=3; there are 3, from 0 on"),
    (dict(layer=np.int32(7), keys=LAYERS, values=LAYERS), ValueError, "layer=7; there are 3, from 0 on"),
    (dict(layer=1.0, keys=LAYERS, values=LAYERS), ValueError, "layer=1.0; give an integer"),
    (dict(blocks=np.zeros((2, 3, 1), np.int32)), ValueError, r"int32 \(2, 3, 1\); give int32 \[B, K or N, n\]"),
    (dict(blocks=np.zeros((2, 2, 1), np.int32)), ValueError, r"with blocks \(2, 2, 1\) give bool"),
    (dict(own=(OWN, np.zeros((2, 4, 8), np.float32))), ValueError, "give key and value"),
    (dict(own=(OWN,)), ValueError, "own has length 1; give a key and a value"),
    (dict(own=(OWN, OWN, OWN)), ValueError, "own has length 3; give a key and a value"),
    (dict(implementation="quick"), ValueError, "'quick' is unknown"),
    (dict(implementation="cudnn"), NotImplementedError, "does not exist for decode_attention"),
    (dict(implementation="mosaic_gpu"), NotImplementedError, r"runs on Hopper GPUs \(.* 9\.0\), not on 'cpu'"),
])
def test_bad_arguments(change, error, message):
  cache = np.zeros((2, 2, 5, 8), np.float32)
  arguments = dict(q=np.zeros((2, 4, 8), np.float32), keys=cache, values=cache, visible=np.ones((2, 5), bool))
  with pytest.raises(error, match=message):
    decode_attention(**(arguments | change))


@pytest.mark.parametrize(("shape", "message"), [
    (ArgSpec(1, 8, 1, 1, 96), r"H in \(64, 128, 256\), not 96"),
    (ArgSpec(1, 8, 1, 1, 64, "float16"), "bfloat16 or float32, not float16"),
])
@pytest.mark.usefixtures("any_device")
def test_what_the_kernel_refuses(shape, message):
  with pytest.raises(NotImplementedError, match=message):
    decode_attention(*draw(shape), implementation="mosaic_gpu")
  api.decode_attention(*draw(shape))


@pytest.mark.usefixtures("any_device")
def test_blocks_that_the_kernel_refuses():
  q, keys, values, visible, blocks = draw_blocks(ArgSpec(1, 24, 1, 1, 128), 12, 1)
  with pytest.raises(NotImplementedError, match="blocks of a multiple of 8 rows at H=128 and bfloat16, not of 12"):
    decode_attention(q, keys, values, visible, blocks=blocks, implementation="mosaic_gpu")


@pytest.mark.parametrize("change", [dict(tile_rows=0), dict(tile_rows=257), dict(stages=0), dict(splits=0)])
def test_bad_tuning(change):
  with pytest.raises(ValueError, match=f"Tuning: {next(iter(change))}="):
    Tuning(**change)


def test_tiles_fit_shared_memory():
  shape = ArgSpec(1, 4097, 1, 1, 256, "float32")
  jax.eval_shape(mosaic_gpu.decode_attention, *shape.types())
  with pytest.raises(ValueError, match="stages=2 of 128 rows are 524288 bytes"):
    jax.eval_shape(functools.partial(mosaic_gpu.decode_attention, tuning=Tuning(128, splits=1)), *shape.types())
