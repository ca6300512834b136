"""What is counted of kernels for TPUs, against sums by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from command_line import settings
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from experiments import roofline as command
from experiments.aot import kernel_cases
from experiments.aot.chips import CHIPS
from experiments.aot.roofline import STEP, Data, Kernel, kernels_of, predicted
from pallas_kernels.dilated.arg_specs import ArgSpec as Dilated
from pallas_kernels.pattern import Pattern
from pallas_kernels.scan.arg_specs import ArgSpec as Scan

F32 = jnp.float32


def product_kernel(a_ref, b_ref, out_ref, sum_ref):
  i, j = pl.program_id(0), pl.program_id(1)

  @pl.when(j == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  jax.lax.fori_loop(0, i + 1, lambda turn, _: sum_ref.__setitem__(
      ..., sum_ref[...] + jnp.dot(a_ref[...], b_ref[...], preferred_element_type=F32)), None)
  out_ref[...] = jnp.exp(sum_ref[...])


def test_copies_products_and_elements_of_a_grid():
  """Two steps of i, three of j; b has a last block of 44 of its 128 columns."""
  a, b = jax.ShapeDtypeStruct((16, 128), F32), jax.ShapeDtypeStruct((128, 300), F32)
  f = lambda a, b: pl.pallas_call(
      product_kernel, grid=(2, 3), name="product", out_shape=jax.ShapeDtypeStruct((16, 300), F32),
      in_specs=[pl.BlockSpec((8, 128), lambda i, j: (i, 0)), pl.BlockSpec((128, 128), lambda i, j: (0, j))],
      out_specs=pl.BlockSpec((8, 128), lambda i, j: (i, j)), scratch_shapes=[pltpu.VMEM((8, 128), F32)])(a, b)
  (kernel,) = kernels_of(f, a, b)
  assert (kernel.name, kernel.steps) == ("product", 6)
  assert kernel.moved == 4 * (2 * 8 * 128 + 2 * 128 * 300 + 16 * 300)  # a once for each i, b anew for each
  turns = 3 * (1 + 2)
  assert kernel.products == turns * 2 * 8 * 128 * 128
  assert kernel.elements == turns * 8 * 128 + 6 * 8 * 128  # sums, exponentials
  assert kernel.vmem == 4 * (2 * (8 * 128 + 128 * 128 + 8 * 128) + 8 * 128)


def listed_kernel(list_ref, x_ref, out_ref, buffer, semaphore):
  out_ref[...] = jnp.zeros_like(out_ref)

  def turn(i, _):
    copy = pltpu.make_async_copy(x_ref.at[pl.ds(list_ref[0, i + 1], 8)], buffer, semaphore)
    copy.start()
    copy.wait()
    jax.lax.cond(jnp.max(buffer[...]) > 0, lambda: out_ref.__setitem__(..., out_ref[...] + buffer[...]), lambda: None)

  jax.lax.fori_loop(0, list_ref[0, 0], turn, None)


@pytest.mark.parametrize(("holds", "sums"), [(None, 7), (0.25, 7 / 4)])
def test_copies_by_a_list_and_a_condition_on_data(holds, sums):
  f = lambda listed, x: pl.pallas_call(
      listed_kernel, grid=(5,), name="listed", out_shape=jax.ShapeDtypeStruct((40, 128), F32),
      in_specs=[pl.BlockSpec((1, 9), lambda i: (i, 0), memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)],
      out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)),
      scratch_shapes=[pltpu.VMEM((8, 128), F32), pltpu.SemaphoreType.DMA])(listed, x)
  types = jax.ShapeDtypeStruct((5, 9), jnp.int32), jax.ShapeDtypeStruct((64, 128), F32)
  (kernel,) = kernels_of(f, *types, data={"listed": Data(7, holds)})
  of_block = 8 * 128
  assert kernel.moved == 4 * (5 * 9 + 40 * 128 + 5 * 7 * of_block)
  assert kernel.elements == 5 * (7 * of_block + sums * of_block)  # the maximum, and the sums


def stepped_kernel(x_ref, out_ref):
  i = pl.program_id(0)

  @pl.when(i == 0)
  def _():
    out_ref[...] = jnp.exp(x_ref[...])

  @pl.when((jnp.max(x_ref[...]) > 0) & (i > 0))
  def _():
    out_ref[...] = x_ref[...] + 1


def test_a_condition_on_the_step_is_followed_beside_one_on_data():
  f = lambda x: pl.pallas_call(stepped_kernel, grid=(8,), name="stepped", out_shape=x,
                               in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
                               out_specs=pl.BlockSpec((8, 128), lambda i: (i, 0)))(x)
  (kernel,) = kernels_of(f, jax.ShapeDtypeStruct((64, 128), F32), data={"stepped": Data(holds=0.5)})
  of_block = 8 * 128
  assert kernel.elements == 8 * of_block + of_block + 7 * of_block / 2  # maxima, the first step, half of the others


def test_seconds_are_of_the_longest_part_and_of_steps():
  chip = CHIPS["v5p"]
  kernel = Kernel("a kernel", steps=10, moved=chip.bandwidth, products=2 * chip.products, elements=chip.vector, vmem=0,
                  parallel=4)
  assert predicted([kernel, kernel], chip) == pytest.approx(2 * (2 + 10 * STEP / 2))
  of_one_core = dataclasses.replace(kernel, parallel=1)
  assert predicted([of_one_core], chip) == pytest.approx(4 + 10 * STEP)


def test_the_memory_is_read_and_written_once():
  case = kernel_cases.KernelCase("memory", Scan(2, 1024, 8))
  cell = case.counted()
  (kernel,) = cell["kernels"]
  assert kernel["moved"] == cell["moved"]
  assert kernel["products"] == 0


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("pattern", "most"), [
    (Pattern(1), 1.1), (Pattern(16, 0, 4), 1.65), (Pattern(4, 700, 0), 1.7), (Pattern(None, 100, 4), 6.1)])
def test_attention_computes_what_it_needs_and_little_more(pattern, most, gradient):
  """Of a short window whole blocks of 512 keys are multiplied."""
  cell = kernel_cases.KernelCase("attention", Dilated(1, 16384, 2, 1, pattern=pattern), gradient).counted()
  done = sum(kernel["products"] for kernel in cell["kernels"]) / cell["products"]
  assert 1 <= done <= most


def test_the_command_prints_a_table(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(kernel_cases, "CASES", (kernel_cases.KernelCase("memory, short", Scan(1, 512, 8)),))
  command.main(settings(command, f"--workdir={tmp_path}"))
  printed = capsys.readouterr().out
  assert "| memory, short" in printed
  assert "memory)" in printed.splitlines()[-1]
  assert (tmp_path / "results.json").exists()
