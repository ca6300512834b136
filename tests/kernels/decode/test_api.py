"""`decode_attention`: plain JAX at any shape, how its results merge with others, and what is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from conftest import OPERATION, assert_close, examples
from kernels import suite
from pallas_kernels import decode_attention
from pallas_kernels.attention import softmax
from pallas_kernels.decode import reference
from pallas_kernels.decode.arg_specs import ArgSpec


@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([(1, 1), (4, 4), (6, 2)]), st.sampled_from([8, 64]),
       st.sampled_from(["float32", "bfloat16"]), st.booleans(), st.integers(0, 9))
@examples(4)
def test_plain_jax_equals_the_reference(batch, rows, heads, width, dtype, per_head, seed):
  suite.check_poison("decode_attention", "xla", ArgSpec(batch, rows, *heads, width, dtype, per_head), seed)


@given(st.integers(1, 2), st.integers(1, 40), st.sampled_from([(1, 1), (4, 4), (6, 2)]), st.integers(1, 9),
       st.integers(1, 6), st.booleans(), st.integers(0, 9))
@examples(4)
def test_plain_jax_reads_chosen_blocks(batch, rows, heads, block, chosen, apart, seed):
  spec = ArgSpec(batch, rows, *heads, 8, "float32", block=block, chosen=min(chosen, -(-rows // block)), apart=apart)
  suite.check_poison("decode_attention", "xla", spec, seed)


def test_own_token_and_cache_merge_to_one_softmax():
  (q, keys, values, _), rest = ArgSpec(2, 12, 4, 2, 8, "float32").draw()
  visible = np.array(rest["visible"])
  seen = visible.copy()
  seen[:, 11] = True  # the new token
  visible[:, 11] = False
  out, lse = jax.jit(decode_attention)(q, keys, values, visible)
  own = softmax.attend_part(q[:, None], keys[:, None, :, 11], values[:, None, :, 11], np.ones((2, 1, 1, 1), bool))
  merged = softmax.merge([(out[:, None], lse[:, None]), own])[:, 0]
  assert_close(merged, reference.decode_attention(q, keys, values, seen)[0], OPERATION)


def test_rows_that_see_nothing_have_finite_gradients():
  (q, keys, values, _), rest = ArgSpec(2, 5, 2, 2, 8, "float32").draw()

  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def gradients(q, keys, values):
    out, lse = decode_attention(q, keys, values, rest["visible"])
    return jnp.sum(out**2) + jnp.sum(jnp.where(lse == softmax.NOTHING, 0, lse))

  for gradient in jax.jit(gradients)(q, keys, values):
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[-1], 0)


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
    (dict(blocks=np.zeros((2, 3, 1), np.int32)), ValueError, r"int32 \(2, 3, 1\); give integers \[B, K or N, n\]"),
    (dict(blocks=np.zeros((2, 2, 1))), ValueError, r"float32 \(2, 2, 1\); give integers \[B, K or N, n\]"),
    (dict(blocks=np.full((2, 2, 1), 2**32)), ValueError, "blocks holds 4294967296, which int32 does not"),
    *((dict(layer=layer, keys=LAYERS, values=LAYERS), ValueError, f"layer={int(layer)}; there are 3, from 0 on")
      for layer in (-1, np.array(-1), jnp.int32(7), np.array(2**32), 2**70)),
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


def test_blocks_that_are_read_are_there():
  """Three blocks of two rows, the last of one; what has no visible row may be any number."""
  cache = np.random.default_rng(0).normal(size=(1, 1, 5, 8)).astype(np.float32)
  visible = np.array([[[[True, True], [False, False]]]])
  arguments = cache[:, :, 0], cache, cache
  expected, _ = decode_attention(*arguments, visible, blocks=np.array([[[2, 0]]], np.int32))
  out, _ = decode_attention(*arguments, visible, blocks=np.array([[[2, 99]]], np.uint16))
  np.testing.assert_array_equal(out, expected)
  for wrong in (3, -1):
    with pytest.raises(ValueError, match=rf"blocks holds {wrong}, which is read; .* are 0\.\.2\."):
      decode_attention(*arguments, visible, blocks=np.array([[[wrong, 0]]]))
