"""The Hopper kernel of decode attention: in Pallas' interpreter, and lowered for CUDA at real shapes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import GRADIENT, OPERATION, assert_close
from gpu_interpreter import InterpretParams
from kernels import suite
from pallas_kernels import decode_attention
from pallas_kernels.attention import softmax
from pallas_kernels.decode import mosaic_gpu, mosaic_gpu_kernel, xla
from pallas_kernels.decode.arg_specs import ARG_SPECS, ArgSpec
from pallas_kernels.decode.mosaic_gpu_shapes import Cut, Tuning


def check(spec, tuning=None, scale=1.0, relative=OPERATION):
  """The kernel without a GPU, beside the reference. Shared memory starts as NaN there, and a race is an error."""
  (q, keys, values, own), rest = spec.draw()
  q = q * jnp.asarray(scale, q.dtype)
  if own is not None:
    own = (own[0].at[0].multiply(100), own[1])  # in one row the new token's score is far above the others
  (_, bad_keys, bad_values, _), _ = suite.poison_decode((q, keys, values, own), rest)
  run = jax.jit(functools.partial(mosaic_gpu_kernel.decode_attention, tuning=tuning,
                                  interpret=InterpretParams(detect_races=True)))
  ours = run(q, bad_keys, bad_values, rest["visible"], rest["layer"], own, rest["blocks"])
  theirs, _ = suite.in_float64(functools.partial(suite.CASES["decode_attention"].reference, **rest),
                               (q, keys, values, own))
  for one, other in zip(ours, theirs, strict=True):
    assert one.dtype == jnp.float32
    suite.compare(one, other, relative, "decode_attention", "interpreted")


@pytest.mark.parametrize(("spec", "tuning"), [
    (ArgSpec(2, 1, 1, 1, 128), None),                                    # one row, less than the threads take at a time
    (ArgSpec(2, 37, 2, 2, 64), Tuning(tile_rows=16)),                    # tiles that do not divide the rows
    (ArgSpec(3, 19, 2, 1, 128), Tuning(tile_rows=8, stages=3)),          # grouped heads; a row without a tile to read
    (ArgSpec(2, 33, 5, 1, 256), Tuning(tile_rows=12, splits=2)),         # a group that is cut into blocks; two splits
    pytest.param(ArgSpec(1, 30, 2, 2, 128, "float32"), Tuning(tile_rows=4, stages=1, splits=3), marks=pytest.mark.slow),
    pytest.param(ArgSpec(2, 9, 1, 1, 256, "float32"), None, marks=pytest.mark.slow),
    pytest.param(ArgSpec(2, 21, 3, 1, 64, "float32"), Tuning(tile_rows=8), marks=pytest.mark.slow),
    (ArgSpec(2, 20, 4, 2, 64, per_head=True), Tuning(tile_rows=16)),
    (ArgSpec(2, 10, 2, 1, 64, "float32", layers=3), None),
], ids=str)
def test_the_kernel_equals_the_reference(spec, tuning):
  check(spec, tuning)


@pytest.mark.parametrize("spec", [ArgSpec(3, 19, 2, 1, 128, own=True), ArgSpec(2, 33, 5, 1, 64, "float32", own=True)],
                         ids=str)
def test_the_own_key_is_one_more_row_of_the_cache(spec):
  """Also where nothing of the cache is seen, and in several splits."""
  check(spec, Tuning(tile_rows=8, splits=2))


@pytest.mark.parametrize(("spec", "tuning"), [
    (ArgSpec(2, 90, 2, 2, 128, block=16, chosen=3), None),                          # the cache ends within a block
    # Of two tiles, grouped heads:
    pytest.param(ArgSpec(2, 64, 4, 2, 128, block=32, chosen=2), Tuning(tile_rows=16, stages=3), marks=pytest.mark.slow),
    (ArgSpec(1, 70, 4, 2, 64, block=16, chosen=4, apart=True), Tuning(splits=2)),   # query heads that choose apart
    # A cache smaller than a block:
    pytest.param(ArgSpec(2, 10, 1, 1, 128, "float32", block=16, chosen=1), None, marks=pytest.mark.slow),
    pytest.param(ArgSpec(2, 50, 2, 1, 256, block=8, chosen=5, apart=True), None, marks=pytest.mark.slow),
    pytest.param(ArgSpec(2, 40, 4, 2, 64, "float32", block=8, chosen=3, own=True), None, marks=pytest.mark.slow),
    (ArgSpec(2, 40, 4, 2, 64, "float32", block=8, chosen=3, apart=True, own=True, layers=3), None),
], ids=str)
def test_the_kernel_reads_chosen_blocks(spec, tuning):
  check(spec, tuning)


def test_the_kernel_with_large_scores():
  check(ArgSpec(1, 20, 1, 1, 64, "float32"), Tuning(tile_rows=8), scale=300.0, relative=1e-4)


def test_what_is_not_finite_stays_in_its_row():
  (q, keys, values, _), _ = ArgSpec(3, 6, 2, 2, 64).draw()
  run = jax.jit(functools.partial(mosaic_gpu_kernel.decode_attention, interpret=InterpretParams()))
  visible = jnp.ones((3, 6), bool)
  clean, _ = run(q, keys, values, visible)
  out, lse = run(*(x.at[1].set(jnp.nan) for x in (q, keys, values)), visible)
  np.testing.assert_array_equal(np.asarray(out)[[0, 2]], np.asarray(clean)[[0, 2]])
  assert np.isfinite(np.asarray(lse)[[0, 2]]).all()
  assert np.isnan(np.asarray(out)[1]).all()


@pytest.mark.parametrize("with_own", [False, True])
def test_the_kernel_has_the_gradient_of_plain_jax(with_own, monkeypatch):
  monkeypatch.setattr(mosaic_gpu_kernel, "decode_attention",
                      lambda *arguments: jax.lax.stop_gradient(xla.decode_attention(*arguments)))
  (q, keys, values, own), rest = ArgSpec(2, 5, 2, 1, 64, "float32", own=with_own, layers=2).draw()

  @functools.partial(jax.jit, static_argnums=4)
  @functools.partial(jax.grad, argnums=(0, 1, 2, 3))
  def gradients(q, keys, values, own, run):
    out, lse = run(q, keys, values, rest["visible"], rest["layer"], own, None)
    return jnp.sum(out**2) + jnp.sum(jnp.where(lse == softmax.NOTHING, 0, lse))

  both = (jax.tree.leaves(gradients(q, keys, values, own, run)) for run in (mosaic_gpu.run, xla.decode_attention))
  for ours, theirs in zip(*both, strict=True):
    assert np.abs(ours).max() > 0
    assert_close(ours, theirs, GRADIENT)


def test_masks_set_every_visible_row_once():
  masks_of = jax.jit(mosaic_gpu_kernel.tile_masks, static_argnums=0)
  for rows in (1, 64, 65, 130):
    for tile_rows in (8, 60):
      cut = Cut(1, 2, 2, rows, 128, jnp.dtype("bfloat16"), Tuning(tile_rows))
      visible = np.random.default_rng(rows).random((1, 1, rows)) < 0.5
      masks, count = masks_of(cut, visible)
      at = np.asarray(cut.starts())[:, None] + np.arange(cut.flags)
      np.testing.assert_array_equal(np.sort(at[np.asarray(masks[0, 0]) == 1]), np.flatnonzero(visible[0, 0]))
      assert not np.asarray(masks)[0, 0, int(count[0, 0]):].any()
      assert count[0, 0] == 0 or np.asarray(masks)[0, 0, int(count[0, 0]) - 1].any()


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("spec", [pytest.param(spec, id=name, marks=() if i == 0 else pytest.mark.slow)
                                  for i, (name, spec) in enumerate(ARG_SPECS.items())])
def test_lowers_for_cuda(spec):
  """The public function; no GPU is needed."""
  run = jax.jit(functools.partial(decode_attention, implementation="mosaic_gpu"))
  traced = run.trace(*spec.types(), **spec.optional_types())
  assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_small_batches_split_the_cache():
  splits = {batch: Cut(batch, 32, 32, 4097, 128, jnp.dtype("bfloat16"), Tuning()).splits
            for batch in (1, 4, 13, 256)}
  assert splits == {1: 13, 4: 4, 13: 1, 256: 1}
  uneven = Cut(1, 1, 1, 5 * 64, 128, jnp.dtype("bfloat16"), Tuning(splits=4))
  assert (uneven.tiles, uneven.tiles_per_split, uneven.splits) == (5, 2, 3)


@pytest.mark.parametrize(("spec", "message"), [
    (ArgSpec(1, 8, 1, 1, 96), r"H in \(64, 128, 256\), not 96"),
    (ArgSpec(1, 8, 1, 1, 64, "float16"), "bfloat16 or float32, not float16"),
    (ArgSpec(1, 24, 1, 1, 128, block=12, chosen=1), "blocks of a multiple of 8 rows at H=128 and bfloat16, not of 12"),
], ids=str)
@pytest.mark.usefixtures("on_h200")
def test_what_the_kernel_refuses(spec, message):
  run = functools.partial(decode_attention, implementation="mosaic_gpu")
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(run, *spec.types(), **spec.optional_types())


@pytest.mark.parametrize("change", [dict(tile_rows=0), dict(tile_rows=257), dict(stages=0), dict(splits=0)])
def test_bad_tuning(change):
  with pytest.raises(ValueError, match=f"Tuning: {next(iter(change))}="):
    Tuning(**change)


def test_tiles_fit_shared_memory():
  shape = ArgSpec(1, 4097, 1, 1, 256, "float32")
  jax.eval_shape(mosaic_gpu_kernel.decode_attention, *shape.types())
  with pytest.raises(ValueError, match="stages=2 of 128 rows are 524288 bytes"):
    jax.eval_shape(functools.partial(mosaic_gpu_kernel.decode_attention, tuning=Tuning(128, splits=1)), *shape.types())
