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
from experiments.aot import kernel_programs
from experiments.aot.chips import programs_for
from experiments.aot.interpreted import NAME, kernels
from kernels import suite
from kernels.tpu_shapes import COMPILED, EVERY, QUICK, SMALL_COMPILED, dilated
from pallas_kernels import implementation
from pallas_kernels.decode.arg_specs import ArgSpec as Decode
from pallas_kernels.dilated import pallas_tpu as dilated_tpu
from pallas_kernels.pattern import Pattern
from pallas_kernels.scan.arg_specs import ArgSpec as Scan
from pallas_kernels.scan.pallas_tpu import PallasTPU
from pallas_kernels.scan.xla import XLA
from pallas_kernels.sparse import pallas_tpu as sparse_tpu
from pallas_kernels.sparse.arg_specs import ArgSpec as Sparse
from pallas_kernels.table import IMPLEMENTATIONS

OPERATIONS = [operation for operation in IMPLEMENTATIONS if NAME in IMPLEMENTATIONS[operation]]
RACES, RACE = dict(detect_races=True, num_cores_or_threads=2), "RACE DETECTED"  # what is asked for, and then printed


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


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_older_tpu_has_none(operation):
  with programs_for("TPU v4", "tpu"):
    assert suite.reason(operation, NAME, dict(QUICK)[operation]) == "runs on TPUs from v5e and v5p on, not on 'TPU v4'"


@pytest.mark.slow
@pytest.mark.tpu
@tpu_compiler
@pytest.mark.parametrize("topology", kernel_programs.HOSTS)
@pytest.mark.parametrize(("operation", "spec"), COMPILED, ids=str)
def test_the_compiler_for_tpus_takes_them(topology, operation, spec):
  check_compiled(topology, operation, spec)


@pytest.mark.slow
@tpu_compiler
@pytest.mark.parametrize("operation", SMALL_COMPILED)
@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_a_small_one_of_each_compiles(operation, precision):
  """What `make test-compiled` runs; whatever precision a user asks of products."""
  check_compiled("v5e:2x2", operation, SMALL_COMPILED[operation], precision)


def check_compiled(topology, operation, spec, precision="default"):
  """Forward alone, and forward with backward, of the public function; both have kernels of ours."""
  for gradient in (False, True):
    with jax.default_matmul_precision(precision):
      text = kernel_programs.traced_kernel(spec, topology, gradient).lower().compile().as_text()
    # The gradient of decoding is plain JAX.
    assert sum(kernel_programs.calls(text).values()) >= 1 + (gradient and operation != "decode_attention")
