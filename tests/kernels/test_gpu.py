"""The suite's checks on a GPU, over a grid of shapes and over any shapes: what takes a processor too long.

Run by `make test-gpu` together with the suite; it prints the worst errors (as shares of the largest entry) at the end.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from conftest import BFLOAT16, OPERATION
from kernels import suite
from pallas_kernels import dilated_attention, gated_scan
from pallas_kernels.decode.arg_specs import ArgSpec as Decode
from pallas_kernels.dilated.arg_specs import ArgSpec as Dilated
from pallas_kernels.pattern import Pattern
from pallas_kernels.scan.arg_specs import ArgSpec as Scan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
              pytest.mark.usefixtures("true_float32")]
BOTH = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def check(operation, name, spec, seed=0):
  suite.check_numbers(operation, name, spec, seed)
  suite.check_poison(operation, name, spec, seed)


def scan(*shape, dtype="float32", **how):
  return Scan(*shape, dtype, dtype, **how)


@BOTH
@pytest.mark.parametrize("name", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize(("shape", "how"), [
    ((2, 1, 1, 64), {}), ((1, 37, 3, 64), dict(reset=True)), ((2, 128, 2, 128), {}), ((1, 8192, 1, 64), {}),
    ((1, 1000, 4, 128), dict(reset=True)), ((3, 513, 1, 256), dict(inputs=1)), ((8, 1024, 16, 128), dict(reset=True))])
def test_gated_scan(name, shape, how, dtype):
  check("gated_scan", name, scan(*shape, dtype=dtype, **how))


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 600), st.integers(1, 5), st.sampled_from([8, 64, 96]), st.booleans(),
       st.integers(0, 9))
def test_gated_scan_of_any_shape(batch, length, heads, width, reset, seed):
  check("gated_scan", "mosaic_gpu", scan(batch, length, heads, width, reset=reset), seed)


def dilated(length, pattern, heads, groups, width, dtype="bfloat16"):
  return Dilated(2, length, heads * groups, heads, width, dtype, Pattern(*pattern))


DILATED = [  # tokens, (D, W, S0), key/value heads, query heads of each, width
    (257, (16, 0, 0), 1, 1, 64), (250, (16, 0, 4), 2, 1, 128), (9, (16, 0, 0), 2, 2, 64), (300, (4, 17, 9), 2, 3, 64),
    (128, (64, 256, 4), 2, 1, 128), (512, (1, 0, 0), 2, 1, 128), (511, (None, 40, 4), 1, 4, 64),
    (384, (64, 0, 70), 2, 1, 128), (1024, (16, 32, 0), 4, 2, 128), (1, (None, 1, 0), 1, 1, 64),
    (30, (16, 0, 0), 2, 1, 64), (2, (16, 0, 1), 1, 1, 64), (3, (16, 0, 1), 1, 1, 64)]


@pytest.mark.parametrize(("name", "dtype"), [
    ("xla", "float32"), ("xla", "bfloat16"), ("cudnn", "bfloat16"), ("cudnn_masked", "bfloat16"),
    ("mosaic_gpu", "bfloat16")])
@pytest.mark.parametrize("case", DILATED, ids=str)
def test_dilated_attention(name, dtype, case):
  check("dilated_attention", name, dilated(*case, dtype))


def test_plain_jax_alone_takes_wide_heads():
  for dtype in ("float32", "bfloat16"):
    check("dilated_attention", "xla", dilated(250, (16, 3, 4), 2, 2, 256, dtype))
  for name in ("cudnn", "cudnn_masked", "mosaic_gpu"):
    assert suite.check_refusal("dilated_attention", name, dilated(250, (16, 3, 4), 2, 2, 256))


@pytest.mark.parametrize("case", [
    (512, (4, 0, 5), 1, 2, 128), (768, (2, 3, 0), 1, 4, 128), (1024, (64, 300, 60), 2, 1, 64),
    (4096, (16, 0, 4), 2, 2, 128), (2048, (8, 40, 30), 2, 1, 64)], ids=str)
def test_dilated_attention_of_many_tiles(case):
  check("dilated_attention", "mosaic_gpu", dilated(*case))


@pytest.mark.parametrize("name", ["cudnn", "mosaic_gpu"])
@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 40)), st.integers(0, 60), st.integers(0, 20),
       st.sampled_from([(1, 1), (2, 3)]), st.sampled_from([64, 128]), st.integers(0, 9))
def test_dilated_attention_of_any_shape(name, length, dilation, window, sinks, heads, width, seed):
  check("dilated_attention", name, dilated(length, (dilation, window, sinks), *heads, width), seed)


@BOTH
@pytest.mark.parametrize("name", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize("spec", [
    Decode(1, 1, 1, 1, 64), Decode(2, 37, 2, 2, 64), Decode(3, 65, 4, 4), Decode(2, 257, 8, 2, per_head=True),
    Decode(2, 77, 12, 2, 64), Decode(2, 33, 5, 1, 256), Decode(1, 4097, 8, 8), Decode(64, 257),
    Decode(2, 90, 2, 2, block=16, chosen=3), Decode(2, 1000, 8, 2, block=128, chosen=5),
    Decode(1, 700, 8, 2, 64, block=16, chosen=20, apart=True), Decode(2, 50, 4, 2, 256, block=8, chosen=5, apart=True),
    Decode(64, 1024, block=64, chosen=4)], ids=str)
def test_decode_attention(name, spec, dtype):
  for own in (False, True):
    check("decode_attention", name, dataclasses.replace(spec, dtype=dtype, own=own))


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 700), st.sampled_from([(1, 1), (4, 4), (6, 2), (16, 1)]),
       st.sampled_from([64, 128, 256]), st.booleans(), st.booleans(), st.integers(0, 9))
def test_decode_attention_of_any_shape(batch, rows, heads, width, per_head, own, seed):
  check("decode_attention", "mosaic_gpu", Decode(batch, rows, *heads, width, per_head=per_head, own=own), seed)


def test_models_side_by_side():
  """Under vmap: what trains several seeds in one program."""
  drawn = [scan(2, 256, 1, 64, inputs=1).draw(seed)[0] for seed in range(3)]
  logits, inputs, state = jax.tree.map(lambda *of_all: jnp.stack(of_all), *drawn)
  of_all = {name: jax.jit(jax.vmap(functools.partial(gated_scan, implementation=name)))(logits, inputs, state)
            for name in ("xla", "mosaic_gpu")}
  for ours, theirs in zip(jax.tree.leaves(of_all["mosaic_gpu"]), jax.tree.leaves(of_all["xla"]), strict=True):
    suite.compare(ours, theirs, OPERATION, "gated_scan, mapped", "mosaic_gpu", "float32", "values")


@pytest.mark.parametrize("name", ["cudnn", "cudnn_masked", "mosaic_gpu"])
def test_attention_of_models_side_by_side(name):
  """Queries of three models, one of keys: as one after another."""
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.standard_normal((*lead, 2, 300, heads, 64)), jnp.bfloat16)
             for lead, heads in (((3,), 4), ((), 2), ((), 2)))
  attend = functools.partial(dilated_attention, dilation=16, sinks=4, implementation=name)
  loss = lambda q, k, v: jnp.sum(attend(q, k, v).astype(jnp.float32)**2)
  f = jax.grad(loss, argnums=(0, 1, 2))
  together = jax.jit(jax.vmap(f, in_axes=(0, None, None)))(q, k, v)
  for i in range(3):
    for ours, theirs in zip(together, jax.jit(f)(q[i], k, v), strict=True):
      suite.compare(ours[i], theirs, BFLOAT16, "dilated_attention, mapped", name, "bfloat16", "gradients")
