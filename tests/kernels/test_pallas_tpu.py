"""The kernels for TPUs without a TPU: their numbers in Pallas' interpreter, and whether the TPUs' compiler takes them.

The interpreter fills what is not written with NaN. With two cores it says where programs that may run at once touch the
same memory.
"""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from conftest import tpu_compiler
from experiments.aot.interpreted import NAME, kernels
from kernels import suite
from pallas_kernels import implementation
from pallas_kernels.decode.arg_specs import ArgSpec as Decode
from pallas_kernels.dilated import pallas_tpu as dilated_tpu
from pallas_kernels.dilated.arg_specs import ARG_SPECS as DILATED_SPECS, ArgSpec as Dilated
from pallas_kernels.pattern import Pattern
from pallas_kernels.scan.arg_specs import ARG_SPECS as SCAN_SPECS, SMALL as SMALL_SCAN, ArgSpec as Scan
from pallas_kernels.scan.pallas_tpu import PallasTPU
from pallas_kernels.scan.xla import XLA
from pallas_kernels.sparse import pallas_tpu as sparse_tpu
from pallas_kernels.sparse.arg_specs import ArgSpec as Sparse
from pallas_kernels.table import IMPLEMENTATIONS

OPERATIONS = [operation for operation in IMPLEMENTATIONS if NAME in IMPLEMENTATIONS[operation]]
SCANS = SMALL_SCAN | {"three float32 inputs": Scan(1, 300, 8, 128, "float32", "float32", inputs=3),
                      "two tiles": Scan(1, 700, 1, 128, "float32", "float32", reset=True),
                      "nine groups": Scan(1, 150, 9, 128)}


def dilated(length, pattern, heads=1, groups=1, dtype="float32", width=128):
  return Dilated(1, length, heads * groups, heads, width, dtype, Pattern(*pattern))


DILATEDS = {
    "heads of 384": dilated(700, (4, 200, 2), width=384), "an enormous dilation": dilated(64, (858993460, 0, 1)),
    "one token": dilated(1, (4, 0, 0)), "no window": dilated(300, (16, 0, 4), groups=2),
    "window and sinks": dilated(300, (8, 40, 9), heads=2), "no dilation": dilated(300, (None, 70, 0)),
    "sinks alone": dilated(140, (None, 0, 3)), "the own token alone": dilated(140, (None, 0, 0)),
    "dense": dilated(260, (1, 0, 0)), "a window beyond the row": dilated(140, (4, 300, 2)),
    "sinks beyond the row": dilated(140, (4, 3, 300)), "D beyond the row": dilated(140, (500, 3, 2)),
    "a window of three blocks": dilated(700, (32, 300, 2)), "wide heads": dilated(140, (4, 5, 2), width=256),
    "several blocks of queries": dilated(2100, (4, 0, 3)), "dense, several blocks": dilated(1100, (1, 0, 0)),
    "grouped heads, several blocks and a window": dilated(1300, (64, 600, 3), groups=2),
    "bfloat16, grouped heads": dilated(300, (16, 5, 4), groups=4, dtype="bfloat16"),
    "bfloat16, a window": dilated(200, (16, 150, 4), dtype="bfloat16")}
DECODES = {
    "one row": Decode(1, 1, 1, 1, dtype="float32"), "ragged": Decode(3, 37, 2, 2, dtype="float32"),
    "grouped heads, own token": Decode(3, 21, 6, 2, dtype="float32", own=True),
    "a mask for every head": Decode(2, 30, 4, 2, dtype="float32", per_head=True),
    "the last of three layers": Decode(2, 10, 2, 1, dtype="float32", layers=3),
    "several blocks of rows": Decode(2, 1500, 2, 2, dtype="float32", own=True),
    "several, with a mask for every head": Decode(2, 1100, 2, 1, dtype="float32", per_head=True),
    "blocks": Decode(2, 96, 2, 2, dtype="float32", block=16, chosen=3),
    "blocks of query heads, own token": Decode(2, 72, 4, 2, dtype="float32", block=16, chosen=4, apart=True, own=True),
    "blocks of wide heads, layers": Decode(2, 64, 4, 2, 256, "float32", block=8, chosen=3, layers=2),
    "bfloat16, own token": Decode(3, 65, 4, 4, own=True), "bfloat16, blocks": Decode(2, 48, 4, 2, block=16, chosen=2)}
SPARSES = {
    "one key": Sparse(2, 1, 2, 1, 128, "float32", block=8),
    "ragged tiles": Sparse(1, 37, 6, 2, 128, "float32", block=8, chosen=3),
    "a choice for each group": Sparse(1, 64, 4, 2, 128, "float32", block=16, chosen=2, apart=False),
    "a window and sinks": Sparse(1, 50, 2, 2, 128, "float32", block=8, chosen=2, rule=Pattern(None, 5, 2)),
    "one query": Sparse(3, 70, 4, 4, 128, "float32", block=16, chosen=2, queries=1, rule=Pattern(None, 5, 1)),
    "queries at any positions": Sparse(1, 40, 2, 2, 128, "float32", block=8, chosen=3, queries=11),
    "several tiles": Sparse(1, 300, 2, 1, 128, "float32", block=64, chosen=2),
    "wide heads": Sparse(1, 30, 1, 1, 256, "float32", block=8, chosen=2),
    "queries beyond the keys": Sparse(1, 45, 2, 1, 128, "float32", block=16, chosen=2, queries=20,
                                      rule=Pattern(None, 9, 2)),
    "bfloat16, a window": Sparse(1, 96, 4, 2, 128, block=16, chosen=2, rule=Pattern(None, 3, 1))}
QUICK = [("gated_scan", Scan(1, 37, 1, 16, "float32", "float32", reset=True)),
         ("dilated_attention", DILATEDS["no window"]),
         ("decode_attention", DECODES["blocks of query heads, own token"]),
         ("sparse_attention", SPARSES["a window and sinks"])]
EVERY = [pytest.param(operation, spec, id=f"{operation}, {name}")
         for operation, specs in (("gated_scan", SCANS), ("dilated_attention", DILATEDS),
                                  ("decode_attention", DECODES), ("sparse_attention", SPARSES))
         for name, spec in specs.items()]
RACES, RACE = dict(detect_races=True, num_cores_or_threads=2), "RACE DETECTED"  # what is asked for, and then printed
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
COMPILED = [("gated_scan", SCAN_SPECS[name]) for name in ("prefill_32k", "train_4k", "few_channels")] + [
    ("dilated_attention", DILATED_SPECS[name]) for name in ("prefill_32k", "train_4k_sparser", "window_and_sinks")] + [
    ("dilated_attention", dilated(16384, (16, 256, 4), heads=8, groups=4, dtype="bfloat16")),
    ("dilated_attention", dilated(4096, (64, 0, 4), groups=16, dtype="bfloat16")),
    ("decode_attention", Decode.compact(32, 16384, 64, own=True, layers=2)),
    ("decode_attention", Decode(4, 16384, 32, 8, own=True)), ("decode_attention", Decode(1, 131072)),
    ("decode_attention", Decode(16, 16384, block=64, chosen=16, apart=True)),
    ("decode_attention", Decode(4, 131072, 32, 8, block=512, chosen=16, own=True)),
    ("decode_attention", Decode(4, 300, 12, 2, per_head=True)),
    ("sparse_attention", Sparse.sixteenth(16384, 64, kv_heads=8)), ("sparse_attention", Sparse.sixteenth(65536, 512)),
    ("sparse_attention", Sparse.sixteenth(16384, 512, rule=Pattern(None, 64, 4), kv_heads=8, apart=False)),
    # The most that VMEM is asked for.
    ("gated_scan", Scan(1, 1024, 8, inputs=4)), ("gated_scan", Scan(1, 1024, 8, 128, "float32", "float32", inputs=3)),
    ("dilated_attention", dilated(8192, (16, 700, 4), width=384)),
    ("sparse_attention", Sparse(1, 2048, 32, 1, 128, block=64, chosen=4, apart=False)),
    ("dilated_attention", dilated(262144, (16, 0, 4), heads=4, dtype="bfloat16")),
    ("dilated_attention", dilated(16384, (16, 256, 4), groups=32, dtype="bfloat16")),
    ("dilated_attention", dilated(8192, (1, 0, 0), heads=8, width=256)),
    ("dilated_attention", dilated(16384, (None, 4096, 4), groups=8, dtype="bfloat16")),
    ("decode_attention", Decode(1, 65536, 2, 2, block=64, chosen=256, own=True)),
    ("sparse_attention", Sparse(1, 16384, 16, 1, block=1024, chosen=4, apart=False, rule=Pattern(None, 64, 4))),
    ("sparse_attention", Sparse(1, 8192, 2, 2, 512, "float32", block=512, chosen=2))]
SMALL_COMPILED = {
    "gated_scan": Scan(1, 256, 8, reset=True), "dilated_attention": dilated(512, (16, 100, 4), dtype="bfloat16"),
    "decode_attention": Decode(2, 512, 4, 2, block=64, chosen=3, own=True),
    "sparse_attention": Sparse(1, 512, 2, 1, block=64, chosen=2)}


@pytest.fixture
def interpreted():
  """Lets the processor run the kernels, with the interpreter's parameters that it is called with."""
  with contextlib.ExitStack() as stack:
    yield lambda **parameters: stack.enter_context(kernels(**parameters))


@pytest.mark.usefixtures("true_float32")
@pytest.mark.parametrize(("operation", "spec"), QUICK, ids=[operation for operation, _ in QUICK])
def test_values_and_gradients(interpreted, operation, spec):
  interpreted()
  suite.check_numbers(operation, NAME, spec)
  suite.check_poison(operation, NAME, spec)


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.usefixtures("true_float32")
@pytest.mark.parametrize(("operation", "spec"), EVERY)
def test_every_shape_without_a_race(interpreted, operation, spec, capfd):
  interpreted(**RACES)
  suite.check_numbers(operation, NAME, spec)
  suite.check_poison(operation, NAME, spec)
  assert RACE not in "".join(capfd.readouterr())


def test_a_race_is_found(capfd):
  """Programs that may run at once and write the same block."""
  block = lambda i: (0, 0)
  racing = pl.pallas_call(
      lambda out: out.__setitem__(..., jnp.ones_like(out)), grid=(4,), out_specs=pl.BlockSpec((8, 128), block),
      out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=pltpu.InterpretParams(**RACES),
      compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)))
  try:
    np.testing.assert_array_equal(racing(), 1)
    said = "".join(capfd.readouterr())
  except jax.errors.JaxRuntimeError as error:  # what newer releases of jax do
    said = str(error)
  assert RACE in said


@pytest.fixture
def small_blocks(monkeypatch):
  """Blocks of dilated attention of which short rows have several."""
  jax.clear_caches()
  for name, value in (("_ROWS", 256), ("_KEYS", 256), ("_CHUNK", 128), ("_FEW", 0), ("_COMPACT_LIMIT", 256 * 2**10)):
    monkeypatch.setattr(dilated_tpu, name, value)
  yield
  jax.clear_caches()


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.usefixtures("true_float32", "small_blocks")
@pytest.mark.parametrize(("length", "pattern", "groups"), [
    (1500, (4, 0, 3), 1), (900, (1, 0, 0), 1), (900, (1, 0, 0), 2), (1100, (2, 130, 5), 2), (1100, (64, 600, 3), 1),
    (700, (None, 300, 9), 2), (600, (None, 0, 140), 1)])
def test_several_blocks(interpreted, length, pattern, groups):
  """Of queries, of keys, and of what is kept for gradients."""
  interpreted(**RACES)
  suite.check_numbers("dilated_attention", NAME, dilated(length, pattern, groups=groups))


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.usefixtures("true_float32")
def test_gradients_of_chosen_blocks_in_parts(interpreted, monkeypatch):
  """Three parts of one tile of queries, where the gradients of one fit VMEM."""
  monkeypatch.setattr(sparse_tpu, "_GRADIENT_LIMIT", 4 * 256 * 128)
  interpreted()
  suite.check_numbers("sparse_attention", NAME, Sparse(1, 520, 2, 1, 128, "float32", block=64, chosen=2))


@pytest.mark.parametrize("spec", [Scan(2, 37, 1, 16, "float32", "float32", reset=True), pytest.param(
    Scan(1, 700, 9, 128, reset=True), marks=[pytest.mark.slow, pytest.mark.tpu])], ids=["small", "two tiles"])
def test_sums_of_pieces_of_a_sequence(spec, capfd):
  """What devices that share a sequence exchange."""
  ours = PallasTPU(interpret=pltpu.InterpretParams(uninitialized_memory="nan", **RACES))
  (logits, inputs, _), rest = spec.draw()
  for of in ("ends", "messages"):
    arguments = (logits, inputs, rest["reset"]) if of == "ends" else (logits, rest["reset"], inputs)
    for found, expected in zip(getattr(ours, of)(*arguments), getattr(XLA(), of)(*arguments), strict=True):
      np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
  assert RACE not in "".join(capfd.readouterr())


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.usefixtures("true_float32")
@settings(deadline=None, max_examples=10, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 2), st.integers(1, 600), st.integers(1, 3), st.sampled_from([8, 64, 128]), st.booleans(),
       st.integers(0, 9))
def test_gated_scan_of_any_shape(interpreted, batch, length, heads, width, reset, seed):
  interpreted()
  suite.check_numbers("gated_scan", NAME, Scan(batch, length, heads, width, "float32", "float32", reset=reset), seed)


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.usefixtures("true_float32")
@settings(deadline=None, max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 500), st.none() | st.integers(1, 40), st.integers(0, 300), st.integers(0, 40), st.integers(1, 2),
       st.integers(1, 3), st.integers(0, 9))
def test_dilated_attention_of_any_shape(interpreted, length, dilation, window, sinks, heads, groups, seed):
  interpreted()
  suite.check_numbers("dilated_attention", NAME, dilated(length, (dilation, window, sinks), heads, groups), seed)


@pytest.mark.slow
@pytest.mark.tpu
@pytest.mark.usefixtures("true_float32")
@settings(deadline=None, max_examples=10, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 400), st.sampled_from([8, 24, 64]), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3),
       st.booleans(), st.none() | st.builds(Pattern, st.none(), st.integers(0, 90), st.integers(0, 20)),
       st.integers(0, 9))
def test_sparse_attention_of_any_shape(interpreted, length, block, chosen, heads, groups, apart, rule, seed):
  interpreted()
  suite.check_numbers("sparse_attention", NAME, Sparse(1, length, heads * groups, heads, 128, "float32", block, chosen,
                                                       apart, rule), seed)


@pytest.mark.parametrize(("operation", "spec", "why"), [
    ("dilated_attention", dilated(4, (4, 0, 0), width=64), "takes heads of a multiple of 128, not of 64"),
    ("dilated_attention", dilated(4, (4, 0, 0), dtype="float16"), "takes float32 or bfloat16, not float16"),
    ("dilated_attention", dataclasses.replace(dilated(4, (4, 0, 0)), packed=True), "takes no packed rows"),
    ("decode_attention", Decode(1, 8, 1, 1, 64), "takes heads of a multiple of 128, not of 64"),
    ("decode_attention", Decode(1, 64, 1, 1, block=8, chosen=2), "a multiple of 16 rows of bfloat16, not blocks of 8"),
    ("decode_attention", Decode(1, 40, 1, 1, block=16, chosen=2), "not blocks of 16 of 40 rows"),
    ("decode_attention", Decode(1, 65536, 1, 1, block=64, chosen=512),
     "keeps the chosen keys of a head, bfloat16 (512, 64, 128) of 8388608 bytes, in VMEM, with room for 5242880"),
    ("decode_attention", Decode(1, 1024, 1, 1, 4096), "keeps a block of keys, bfloat16 (1024, 4096) of 8388608 bytes"),
    ("dilated_attention", dilated(4, (4, 0, 0), groups=128),
     "keeps 128 queries of a key/value head, float32 (128, 128, 128) of 8388608 bytes, in VMEM"),
    ("sparse_attention", Sparse(1, 32, 1, 1, 64, block=16), "takes heads of a multiple of 128, not of 64"),
    ("sparse_attention", Sparse(1, 32, 1, 1, block=8), "takes blocks of a multiple of 16 keys of bfloat16, not of 8"),
    ("sparse_attention", Sparse(1, 32, 1, 1, block=16, rule=Pattern(4, 3, 2)), "takes a rule of a window and sinks"),
    ("sparse_attention", Sparse(1, 5000, 1, 1, 512, block=4096), "keeps a block of keys, bfloat16 (4096, 512)"),
    ("sparse_attention", Sparse(1, 64, 64, 1, 512, block=16, apart=False),
     "keeps a tile of queries, float32 (8192, 512) of 16777216 bytes"),
    ("sparse_attention", Sparse(1, 9000, 16, 1, block=2048, apart=False),
     "keeps the scores of a block, float32 (2048, 2048) of 16777216 bytes")])
def test_what_the_kernels_do_not_serve_is_said(interpreted, operation, spec, why):
  interpreted()
  assert why in suite.reason(operation, NAME, spec)
  assert suite.check_refusal(operation, NAME, spec)


def test_tables_that_are_too_long_are_refused():
  sparse, decode = (implementation.load(operation, NAME) for operation in ("sparse_attention", "decode_attention"))
  spec = Sparse(1, 2**20, 1, 1, block=16)
  assert sparse.unsupported(*spec.types(), None, block=spec.block, rule=None) == (
      "keeps two lists of blocks or tiles, int32 (2, 65537) of 524296 bytes, in SMEM, with room for 524288; take larger"
      " blocks")
  spec = Decode(1, 8192, 1024, 1024, block=16, chosen=200)
  assert decode.unsupported(*spec.types(), None, None, spec.optional_types()["blocks"]) == (
      "keeps the blocks of a row, int32 (1024, 200) of 819200 bytes, in SMEM, with room for 524288; take fewer blocks")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_processor_has_none(operation):
  spec = dict(QUICK)[operation]
  assert suite.reason(operation, NAME, spec) == "runs on TPUs from v5e and v5p on, not on 'cpu'"


@pytest.mark.slow
@pytest.mark.tpu
@tpu_compiler
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("operation", "spec"), COMPILED, ids=str)
def test_the_compiler_for_tpus_takes_them(topology, operation, spec):
  check_compiled(topology, operation, spec)


@pytest.mark.slow
@tpu_compiler
@pytest.mark.parametrize("operation", SMALL_COMPILED)
@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_a_small_one_of_each_compiles(operation, precision):
  """What `make test-compiled` runs; whatever precision a user asks of products."""
  check_compiled(TOPOLOGIES[0], operation, SMALL_COMPILED[operation], precision)


def check_compiled(topology, operation, spec, precision="default"):
  """Forward alone, and forward with backward, of the public function; both have kernels of ours."""
  from experiments.aot import kernel_programs

  for gradient in (False, True):
    with jax.default_matmul_precision(precision):
      text = kernel_programs.traced_kernel(spec, topology, gradient).lower().compile().as_text()
    # The gradient of decoding is plain JAX.
    assert sum(kernel_programs.calls(text).values()) >= 1 + (gradient and operation != "decode_attention")
