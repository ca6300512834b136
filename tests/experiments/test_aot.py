"""Programs that are compiled for chips that are not here: what is read of their text, what is counted, what is said."""

from __future__ import annotations

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import aot_compile
from experiments.aot import cases, chips, paper, predict, products, programs
from experiments.aot.hlo import Program, Sent
from rat_jax import Dense, Dilated, RATPlusConfig
from rat_jax.costs import training_flops
from rat_jax.parallel import make_mesh
from tests.experiments.command_line import settings

TEXT = """HloModule step

%added (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%scattered (p: bf16[64,8]) -> bf16[8,8] {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,8]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups=mesh['x'=2,'y'=8] {'y'}, to_apply=%added
  ROOT %slice = bf16[8,8]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={8,8}
}

%taken (q: f32[6,100], i: s32[]) -> f32[100] {
  %q = f32[6,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,100]{1,0} dynamic-slice(%q, %i), dynamic_slice_sizes={1,100}
  ROOT %flat = f32[100]{0} bitcast(%one)
}

%doubled (w: f32[6,100], v: s32[]) -> f32[100] {
  %w = f32[6,100]{1,0} parameter(0)
  %v = s32[] parameter(1)
  %inner = f32[100]{0} fusion(%w, %v), kind=kLoop, calls=%taken
  ROOT %twice = f32[100]{0} add(%inner, %inner)
}

%chain.1 (c: bf16[8]) -> (bf16[16], bf16[8]) {
  %c = bf16[8]{0} parameter(0)
  %all-gather.1 = bf16[16]{0} all-gather(%c), replica_groups={{0,8},{1,9}}, frontend_attributes={chain_id="0"}
  ROOT %both = (bf16[16]{0}, bf16[8]{0}) tuple(%all-gather.1, %c)
}

%condition (t: (s32[], f32[6,100])) -> pred[] {
  %t = (s32[], f32[6,100]{1,0}) parameter(0)
  %number = s32[] get-tuple-element(%t), index=0
  %turns = s32[] constant(6)
  ROOT %less = pred[] compare(%number, %turns), direction=LT
}

%body (s: (s32[], f32[6,100])) -> (s32[], f32[6,100]) {
  %s = (s32[], /*index=1*/f32[6,100]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%s), index=0
  %stack = f32[6,100]{1,0} get-tuple-element(%s), index=1
  %layer = f32[100]{0} fusion(%stack, %n), kind=kLoop, calls=%doubled
  %part = bf16[8]{0} bitcast(%n)
  %first = (bf16[16]{0}, bf16[8]{0}) fusion(%part), kind=kCustom, calls=%chain.1
  %again = bf16[8]{0} get-tuple-element(%first), index=1
  %last = (bf16[16]{0}, bf16[8]{0}) fusion(%again), kind=kCustom, calls=%chain.1
  ROOT %made = (s32[], f32[6,100]{1,0}) tuple(%n, %stack)
}

ENTRY %main (x: f32[6,100], g: bf16[64,8]) -> (s32[], f32[6,100]) {
  %x = f32[6,100]{1,0} parameter(0)
  %g = bf16[64,8]{1,0} parameter(1)
  %near = f32[50]{0:S(1)} copy(%x)
  %all-reduce-scatter = bf16[8,8]{1,0} fusion(%g), kind=kCustom, calls=%scattered
  %halo = bf16[8,8]{1,0} collective-permute(%all-reduce-scatter), source_target_pairs={{0,1},{1,2}}, op_name="f/halo"
  %zero = s32[] constant(0)
  %start = (s32[], f32[6,100]{1,0}) tuple(%zero, %x)
  ROOT %loop = (s32[], f32[6,100]{1,0}) while(%start), condition=%condition, body=%body
}
"""


def test_collectives_of_a_text_with_how_often_they_run():
  found = {one.kind: one for one in Program(TEXT).sent()}
  assert set(found) == {"reduce-scatter", "collective-permute", "all-gather"}
  scattered = found["reduce-scatter"]
  assert (scattered.size, scattered.times, scattered.arrays) == (64 * 8 * 2, 1, ((64, 8),))
  np.testing.assert_array_equal(scattered.groups, np.arange(16).reshape(2, 8))
  assert (found["all-gather"].size, found["all-gather"].times) == (32, 6)  # a chain of two, in a loop of six
  np.testing.assert_array_equal(found["all-gather"].groups, [[0, 8], [1, 9]])
  assert found["collective-permute"].name == "f/halo"
  np.testing.assert_array_equal(found["collective-permute"].groups, [[0, 1], [1, 2]])


def test_bytes_of_a_text():
  copied, scattered, permuted = 2400, 1024 + 128, 2 * 128  # the copy's result is not in the device's memory
  of_a_turn = 400 + 4 + 400 + 16 + 32  # one layer of the stack, and its number; the chain, once
  assert Program(TEXT).moved() == copied + scattered + permuted + 6 * of_a_turn


@pytest.mark.parametrize(("written", "groups"), [
    ("replica_groups=[2,4]<=[8]", np.arange(8).reshape(2, 4)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", np.arange(8).reshape(2, 4).T),
    ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", np.arange(8).reshape(2, 4).T),
    ("replica_groups={{0,4},{1,5}}", np.array([[0, 4], [1, 5]]))])
def test_every_way_in_which_groups_are_written(written, groups):
  text = TEXT.replace("replica_groups={{0,8},{1,9}}", written)
  found = next(one for one in Program(text).sent() if one.kind == "all-gather")
  np.testing.assert_array_equal(found.groups, groups)


def test_products_of_loops_choices_and_parts():
  mesh = make_mesh(devices=jax.devices()[:1])

  def f(x):
    x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)
    x = jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)
    return jax.shard_map(lambda x: x @ x, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())(x)

  traced = jax.jit(jax.grad(lambda x: f(x).sum())).trace(jnp.ones((8, 8)))
  product = 2 * 8**3
  # Forward and two backward for each; what stands in shard_map is one device's.
  assert products.per_device(traced, 4) == pytest.approx(3 * (5 + 0.5) * product / 4 + 3 * product, rel=0.2)
  assert products.per_device(jax.jit(f).trace(jnp.ones((8, 8))), 4) == (5 + 0.5) * product / 4 + product


def test_products_of_a_training_step_are_those_of_its_sizes():
  """As `training_flops` counts, but plain JAX forms scores of all keys; and again those that layers do not keep."""
  config = RATPlusConfig(256, 6, 128, 2, mlp_dim=512)
  mesh = make_mesh(devices=jax.devices()[:1])
  traced, again = (programs.traced("train", programs.Work(config, 4, 64, 1, remat, 4, (Dense(),)), mesh)
                   for remat in ("everything", "products"))
  matrices, of_keys = 6 * (6 * 128 * 128 + 2 * 128 * 512) + 256 * 128, 6 * 128 * 64
  assert products.per_device(traced.program, 1) == 4 * 64 * (6 * matrices + 12 * of_keys)
  assert products.per_device(again.program, 1) == 4 * 64 * (6 * matrices + 16 * of_keys)
  assert traced.kept > 2 * again.kept
  params = matrices + 6 * 2 * 128 + 128
  assert traced.held["parameters"] == 4 * params
  assert traced.held["optimizer"] == pytest.approx(8 * params, rel=1e-4)


class _Chip:
  def __init__(self, *coords):
    self.coords = coords


class _Mesh:
  devices = np.array([_Chip(x, y) for x in range(4) for y in range(4)])


@pytest.mark.parametrize(("kind", "group", "links"), [
    ("all-gather", [0, 1, 2, 3], 2), ("all-gather", [0, 1], 1), ("all-gather", list(range(16)), 4),
    ("all-gather", [0, 4, 8, 12], 2)])
def test_links_that_a_group_goes_over(kind, group, links):
  chip = chips.Chip("a chip", 1.0, 1.0, 1.0, link=10.0)
  seconds = predict._seconds(Sent(kind, 100.0, 0.0, np.array([group]), 1.0, "", ()), chip, _Mesh())
  assert seconds == pytest.approx(100 * (len(group) - 1) / len(group) / (10 * links))


def test_what_is_asked_amiss_is_said_before_a_compiler_is_looked_for():
  for flags, said in ((["--topology=v9:4x4"], "--topology=v9:4x4 is unknown; use v5e, v5p, v6e, tpu7x"),
                      (["--topology=v5e"], r"--topology=v5e has the sizes \[\]; give 2 of 1 or more for v5e"),
                      (["--topology=v5e:2x3x4"], r"has the sizes \[2, 3, 4\]; give 2 of"),
                      (["--topology=v5p:0x4x4"], "give 2 or 3 of 1 or more for v5p"),
                      (["--preset=big"], "preset 'big' is unknown"),
                      (["--batch_size=10", "--accumulation=3"], "--accumulation=3 does not divide --batch_size=10"),
                      (["--mode=snapkv:0.5"], "has no prompt"), (["--mode=dense", "--mode=dilated:4"], "give one"),
                      (["--table", "--mesh=fsdp:8"], "--mesh: --table and --kernels have cases of their own")):
    with pytest.raises(ValueError, match=said):
      aot_compile.main(settings(aot_compile, *flags))


def test_a_missing_compiler_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, "libtpu", None)
  with pytest.raises(ImportError, match=r"needs libtpu, on any machine with Linux; run pip install -e '\.\[tpu\]'"):
    chips.devices_of("v5e:2x2")


def test_the_cost_model_is_that_of_the_sizes():
  config, chip = RATPlusConfig.preset("ratplus-7b"), chips.CHIPS["v5p"]
  assert paper.matrices(config) == 32 * (6 * 4096**2 + 2 * 4096 * 16384)
  alone = paper.update(config, chip, {})
  assert set(alone.sent.values()) == {0.0}
  flops = sum(training_flops(config, mode, 4096) for mode in (Dense(), Dilated(64))) / 2
  assert alone.products == pytest.approx(768 * 4096 * flops / chip.products)
  fsdp = paper.update(config, chip, {"fsdp": 64})
  assert fsdp.sent["fsdp"] == pytest.approx(3 * 2 * paper.matrices(config) * 63 / 64)
  assert fsdp.products == pytest.approx(alone.products / 64)


def test_a_cell_that_does_not_fit_is_said_in_the_table_and_ends_the_command():
  cell = {"preset": "p", "length": 8, "topology": "v5e:2x4", "mesh": "fsdp:8", "batch_size": 8, "accumulation": 1,
          "remat": "products", "memory": 16 * 2**30, "programs": {"train": {"too_large": "too much."}}}
  assert "does not fit" in cases.table([cell])
  with pytest.raises(ValueError, match=r"does not fit into a device of 16 GiB: train: too much. Give more"):
    aot_compile.fail_if_too_large(cell)
  assert math.isclose(chips.CHIPS["v5e"].memory, cell["memory"])
