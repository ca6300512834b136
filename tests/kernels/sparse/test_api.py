"""`sparse_attention`: who reads what, as grids; any shape; what it costs; what must not matter; what is refused."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from conftest import OPERATION, assert_close, examples
from kernels import suite
from pallas_kernels import dilated_attention, sparse_attention
from pallas_kernels.attention import masks, softmax
from pallas_kernels.pattern import DENSE, Pattern
from pallas_kernels.sparse.arg_specs import ARG_SPECS, ArgSpec


def test_who_reads_what():
  """Blocks of two of seven keys; of the queries at 6, 3, 0 and -1, then with every third key besides."""
  blocks = jnp.array([[[[3, 0]], [[1, 2]], [[0, 0]], [[0, 1]]]], jnp.int32)
  at = jnp.array([[6, 3, 0, -1]], jnp.int32)
  np.testing.assert_array_equal(masks.keys_read(blocks, at, 7, 2, None)[0, :, 0], [
      [1, 1, 0, 0, 0, 0, 1],   # the last block has one key
      [0, 0, 1, 1, 0, 0, 0],   # a later block is not read
      [1, 0, 0, 0, 0, 0, 0],   # nor a later key of its own
      [0, 0, 0, 0, 0, 0, 0]])  # padding
  np.testing.assert_array_equal(masks.keys_read(blocks, at, 7, 2, Pattern(3))[0, :, 0], [
      [1, 1, 1, 0, 0, 1, 1],
      [0, 0, 1, 1, 0, 0, 0],
      [1, 0, 0, 0, 0, 0, 0],
      [0, 0, 0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(masks.keys_read(jnp.array([[[[-1, 4, 9]]]]), at[:, :1], 7, 2, None), 0)


@given(st.integers(1, 2), st.integers(1, 40), st.sampled_from([(1, 1), (4, 4), (6, 2)]), st.integers(1, 50),
       st.integers(1, 5), st.booleans(), st.sampled_from([None, DENSE, Pattern(3, 2, 1)]), st.integers(0, 9))
@examples(4)
def test_any_shape(batch, length, heads, block, chosen, apart, rule, seed):
  spec = ArgSpec(batch, length, *heads, 8, "float32", block, chosen, apart, rule, queries=1 + seed)
  suite.check_poison("sparse_attention", "xla", spec, seed)


@pytest.mark.slow
def test_all_blocks_are_dense_attention_and_a_rule_alone_is_its_pattern():
  (q, k, v), rest = ArgSpec(2, 45, 4, 2, 8, "float32", block=10, chosen=5).draw()
  every = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), rest["blocks"].shape)
  out, _ = sparse_attention(q, k, v, every, jnp.ones_like(rest["valid"]), block=10)
  assert_close(out, dilated_attention(q, k, v, dilation=1), OPERATION)
  out, _ = sparse_attention(q, k, v, every, jnp.zeros_like(rest["valid"]), block=10, rule=Pattern(4, 3, 2))
  assert_close(out, dilated_attention(q, k, v, dilation=4, window=3, sinks=2), OPERATION)


def test_chunks_of_queries_are_the_whole():
  """Also in gradients; and the parts of a softmax merge with others by the log-sum-exp."""
  (q, k, v), rest = ArgSpec(1, 90, 2, 2, 8, "float32", block=8, chosen=3, rule=Pattern(None, 2, 1)).draw()
  how = {"block": 8, "rule": rest["rule"]}
  chosen = rest["blocks"], rest["valid"]

  def whole(q, k, v):
    return sparse_attention(q, k, v, *chosen, **how)[0]

  def pieces(q, k, v):
    outs = [sparse_attention(q[:, at:at + 32], k, v, *(x[:, at:at + 32] for x in chosen), **how,
                             q_positions=jnp.arange(90)[None, at:at + 32])[0] for at in range(0, 90, 32)]
    return jnp.concatenate(outs, axis=1)

  for ours, theirs in zip(*(jax.tree.leaves(suite.values_and_gradients(f, (q, k, v))[:2]) for f in (pieces, whole)),
                          strict=True):
    assert_close(ours, theirs, OPERATION)
  half = rest["blocks"] % 2 == 0
  parts = [sparse_attention(q, k, v, rest["blocks"], rest["valid"] & of, block=8) for of in (half, ~half)]
  assert_close(softmax.merge(parts), sparse_attention(q, k, v, *chosen, block=8)[0], OPERATION)


def test_nan_that_nobody_reads_reaches_no_gradient():
  arguments, rest = ArgSpec(2, 60, 4, 2, 8, "float32", block=4, chosen=1, queries=5).draw()
  bad, _ = suite.poison_sparse(arguments, rest)
  assert np.isnan(bad[1]).any()
  f = functools.partial(sparse_attention, **rest)
  clean, spoilt = (suite.values_and_gradients(f, one)[1] for one in (arguments, bad))
  chex.assert_trees_all_equal(clean, spoilt)


@pytest.mark.parametrize("queries", [1, 512])
def test_a_chunk_of_queries_has_no_loop_and_keeps_its_scores(queries):
  spec = ArgSpec(1, 2048, 2, 2, 8, "float32", block=64, chosen=4, queries=queries)
  run = functools.partial(sparse_attention, block=64)
  program = str(jax.make_jaxpr(lambda *a: jax.vjp(lambda q, k, v: run(q, k, v, *a[3:]), *a[:3])[0])(*spec.types()))
  assert "scan" not in program
  assert "while" not in program
  assert "checkpoint" not in program
  assert "remat" not in program


def test_memory_grows_with_the_length_and_not_its_square():
  size = {}
  for length in (4096, 8192, 16384):
    spec = ArgSpec(1, length, 1, 1, 16, "float32", block=64, chosen=4)
    loss = lambda q, k, v, *chosen: jnp.sum(sparse_attention(q, k, v, *chosen, block=64)[0])
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*spec.types()).compile()
    size[length] = program.memory_analysis().temp_size_in_bytes
  assert size[8192] < 2.2 * size[4096]
  assert size[16384] < 2.2 * size[8192]


@pytest.mark.usefixtures("on_h200")
@pytest.mark.parametrize("spec", ARG_SPECS.values(), ids=ARG_SPECS)
def test_lowers_for_cuda(spec):
  """Values and gradients at real shapes: two products of a chunk forward, four of its gradient."""
  run = functools.partial(sparse_attention, block=spec.block, rule=spec.rule)
  loss = lambda q, k, v, *chosen: jnp.sum(run(q, k, v, *chosen)[0])
  text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*spec.types()).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("dot_general") >= 4


X = np.zeros((2, 5, 4, 8), np.float32)
K = np.zeros((2, 5, 2, 8), np.float32)
BLOCKS = np.zeros((2, 5, 2, 1), np.int32)


@pytest.mark.parametrize(("change", "error", "message"), [
    (dict(q=X[0]), ValueError, r"give q \[B, T, N, H\] and k, v \[B, S, K, H\]"),
    (dict(v=K[:, :4]), ValueError, r"k, v have shapes .*\(2, 4, 2, 8\)"),
    (dict(q=X[:1]), ValueError, "B and H must be the same"),
    (dict(q=X[:, :, :0]), ValueError, "at least one entry"),
    (dict(q=X[:, :, :3]), ValueError, "3 heads and k 2; the first must be a multiple"),
    (dict(q=X.astype(jnp.bfloat16)), ValueError, "give them one floating type"),
    (dict(block=0), ValueError, "block=0; use an integer of at least 1"),
    (dict(block=2.0), ValueError, "block=2.0; use an integer"),
    (dict(k=K[:, :3], v=K[:, :3]), ValueError, "q has 5 tokens and k 3; give q_positions"),
    (dict(q_positions=np.zeros((1, 5), int)), ValueError, r"q_positions is int\d+ \(1, 5\); give integers \[B, T\]"),
    (dict(blocks=BLOCKS.astype(float)), ValueError, r"is float32 \(2, 5, 2, 1\); give integers \[B, T, K or N, n\]"),
    (dict(blocks=BLOCKS + np.int64(2**32)), ValueError, r"blocks holds 4294967296, .* use -2147483648\.\.2147483647"),
    (dict(blocks=BLOCKS + 3), ValueError, r"blocks holds 3, which is read; the blocks of these keys are 0\.\.2\."),
    (dict(q_positions=np.full((2, 5), 2**63, np.uint64)), ValueError, "q_positions holds 9223372036854775808"),
    (dict(blocks=BLOCKS[:, :, :1]), ValueError, "here B=2, T=5, K=2, N=4"),
    (dict(valid=BLOCKS), ValueError, r"valid is int32 .* give bool of the shape of blocks, \(2, 5, 2, 1\)"),
    (dict(implementation="fast"), ValueError, "'fast' is unknown"),
    (dict(implementation="mosaic_gpu"), NotImplementedError,
     r"does not exist for sparse_attention; it has \('xla', 'pallas_tpu'\)"),
])
def test_bad_arguments(change, error, message):
  arguments = dict(q=X, k=K, v=K, blocks=BLOCKS, valid=np.ones_like(BLOCKS, bool), block=2)
  with pytest.raises(error, match=message):
    sparse_attention(**(arguments | change))


@pytest.mark.parametrize("wide", [False, True])
def test_blocks_of_any_integer_type(wide):
  (q, k, v), rest = ArgSpec(1, 8, 2, 1, 8, "float32", block=2, chosen=2).draw()
  chosen = np.where(rest["valid"], rest["blocks"], 0)
  expected, _ = sparse_attention(q, k, v, chosen, rest["valid"], block=2)
  with jax.enable_x64(wide):
    for dtype in (np.int64, np.uint8):
      out, _ = sparse_attention(q, k, v, chosen.astype(dtype), rest["valid"], block=2)
      np.testing.assert_array_equal(out, expected)


def test_a_block_beyond_the_keys_is_all_of_them():
  (q, k, v), rest = ArgSpec(1, 8, 2, 1, 8, "float32", block=8, chosen=1).draw()
  out, lse = sparse_attention(q, k, v, rest["blocks"], rest["valid"], block=8)
  for block in (2**31, 2**70, np.int64(9)):
    large, large_lse = sparse_attention(q, k, v, rest["blocks"], rest["valid"], block=block)
    np.testing.assert_array_equal(large, out)
    np.testing.assert_array_equal(large_lse, lse)
