"""Pictures show the numbers that they were given, with labels in colours that stand for nothing else."""

from __future__ import annotations

import itertools
import math

import jax
import numpy as np
import pytest
from matplotlib.colors import to_hex

import rat_jax
from experiments import pictures, tables
from experiments.pictures.canvas import COLOURS, NEUTRAL
from experiments.shared.chosen import chosen_keys
from rat_jax import Dense, Dilated, PerLayer, Quest, RATPlusConfig, RATPlusLM, SnapKV, StreamingLLM, visible
from rat_jax.caches.slots import Slots


def legend(figure):
  """{label: colour} of a figure's legend."""
  return {line.get_label(): to_hex(line.get_color()) for line in figure.legends[0].legend_handles}


def curves(axis):
  """The points of an axis' lines, without what stands in legends alone."""
  return [list(zip(*(np.asarray(x).tolist() for x in line.get_data()), strict=True)) for line in axis.lines]


def test_a_mask_is_what_is_visible():
  modes = [Dense(), Dilated(4, sinks=1), PerLayer((Dense(), Dilated(4)))]
  figure = pictures.masks(modes, length=12)
  shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
  assert len(shown) == 2  # a PerLayer is no square
  for mode, square in zip(modes, shown, strict=False):
    np.testing.assert_array_equal(square, visible(mode, np.arange(12), np.arange(12)))


@pytest.mark.parametrize("mode", [Dense(), Dilated(4, window=3, sinks=1), StreamingLLM(5, 2)], ids=str)
def test_what_is_held_is_what_the_cache_keeps(mode):
  """But the row of the newest token, which a cache keeps until another takes its place."""
  axis = pictures.caches([mode, PerLayer((Dense(), mode))], length=22).axes[0]
  assert len(axis.get_yticks()) == 1  # a PerLayer has no row
  drawn = {int(path.vertices[:, 0].min() + 0.5) for path in axis.collections[0].get_paths()}
  kept = set(np.asarray(Slots.of(mode.pattern, 44).held(np.array([22])))[0].tolist()) - {-1}
  assert drawn <= kept
  assert kept - drawn <= {22 - mode.pattern.window - 1}


def test_a_colour_is_a_model_and_a_neutral_mark_a_method():
  points = {"RAT+": {"dense": [(8, 1.0), (4, 2.0)], "window": [(3, 3.0)]}, "attention": {"dense": [(8, 1.5)]}}
  figure = pictures.against_keys(points, "bits", "title")
  assert curves(figure.axes[0]) == [[(4, 2.0), (8, 1.0)], [(3, 3.0)], [(8, 1.5)]]
  assert legend(figure) == {"RAT+": COLOURS[0], "attention": COLOURS[1], "dense": to_hex(NEUTRAL),
                            "window": to_hex(NEUTRAL)}
  assert [line.get_markerfacecolor() for line in figure.axes[0].lines][1] == "none"


def test_accuracy_by_budget_is_the_mean_of_the_seeds():
  figure = pictures.against_budget({"Quest": {"RAT+": {"1/4": [90.0, 70.0], "1/8": [60.0, 50.0]}}})
  assert curves(figure.axes[0]) == [[(0, 80.0), (1, 55.0)], [(0, 90.0), (0, 70.0)], [(1, 60.0), (1, 50.0)]]


def test_losses_are_in_bits():
  lines = [{"step": step, "loss": [loss, None], "utilisation": None} for step, loss in ((0, math.log(256)), (1, 0.0))]
  figure = pictures.losses(lines, ["dilated:4", "dense"])
  first, second = curves(figure.axes[0])
  assert first == [(0, pytest.approx(8.0)), (1, 0.0)]
  assert np.isnan([loss for _, loss in second]).all()
  lines[0]["utilisation"] = 0.5  # the run went on where the peak is not known
  of_peak, = curves(pictures.losses(lines, ["dilated:4", "dense"]).axes[1])
  assert of_peak[0] == (0, 50.0)
  assert np.isnan(of_peak[1][1])


def test_what_did_not_fit_is_not_drawn():
  lines = [{"part": "decode", "mode": mode, "context": context, "batch_size": 2, "seconds": 0.5}
           for mode, context in (("dense", 32), ("dilated:4", 32), ("dilated:4", 64))]
  assert curves(pictures.throughput(lines).axes[0]) == [[(32, 4.0)], [(32, 4.0), (64, 4.0)]]
  assert pictures.throughput(lines[:2]) is None  # nothing varies


def test_an_operation_at_one_length_is_not_drawn():
  of = lambda length, dilation: {"implementation": "xla", "seconds": length / 1e3, "case": {
      "op": "prefill", "length": length, "batch": 1, "dilation": dilation, "window": 0, "block": 0, "gradient": False}}
  figure = pictures.against_length([of(8, 1), of(16, 1), of(8, 4), of(16, 4), of(8, 2)], "prefill")
  assert curves(figure.axes[0]) == [[(8, 8.0), (16, 16.0)]] * 2
  assert list(legend(figure)) == ["dense", "D=4", "plain JAX"]
  assert pictures.against_length([of(8, 1)], "prefill") is None


@pytest.mark.parametrize("name", tables.FIGURES)
def test_the_figures_of_the_results_have_six_panels_at_most(name):
  figure = tables.FIGURES[name](tables.read_result)
  assert 1 <= len([axis for axis in figure.axes if axis.lines or axis.patches or axis.images or axis.collections]) <= 6


def test_chosen_keys_are_those_of_every_query():
  """Against loops over what `inspect` tells: valid blocks, or kept positions and all that comes after the prompt."""
  model = RATPlusLM(RATPlusConfig(vocab_size=16, num_layers=2, embed_dim=16, num_heads=2, init_std=None))
  tokens = np.random.default_rng(0).integers(0, 16, (1, 14))
  params, prompt = model.init(jax.random.key(0), tokens)["params"], 9
  of = lambda mode: rat_jax.inspect(model, params, tokens, mode, prompt_lengths=np.array([prompt]))
  for mode in (Quest(4, block=2), SnapKV(4, obs_window=2)):
    found = chosen_keys(model, params, tokens, mode, prompt)
    assert found.shape == (2, 2, 14, 14)
    for layer, told in enumerate(of(mode)):
      for head, query in itertools.product(range(2), range(14)):
        if isinstance(mode, Quest):
          blocks = [int(b) for b, valid in zip(told.blocks[0, query, head], told.valid[0, query, head], strict=True)
                    if valid]
          read = {key for b in blocks for key in (2 * b, 2 * b + 1)}
        else:
          read = {int(key) for key in told.positions[0, head]} | set(range(prompt, 14))
        assert set(np.flatnonzero(found[layer, head, query])) == {key for key in read if 0 <= key <= query}
  assert len(chosen_keys(model, params, tokens, Dilated(4), prompt)) == 0


def test_a_mesh_cuts_what_its_rules_say():
  axes = pictures.meshes().axes
  assert [axis.get_title() for axis in axes] == ["data:4", "fsdp:4", "tensor:4", "context:4"]
  owner = np.repeat(np.arange(4), 2)
  down, across, whole = np.tile(owner[:, None], 8), np.tile(owner, (8, 1)), np.full((8, 8), -1)
  of_axes = ((down, whole, whole, whole), (down, down, across, whole), (whole, across, down, down),
             (across, whole, whole, across))  # a batch, query, mlp_out, a cache
  for axis, wanted in zip(axes, of_axes, strict=True):
    shown = axis.images[0].get_array()
    assert len(axis.texts) == sum(square is whole for square in wanted)
    for i, square in enumerate(wanted):
      np.testing.assert_array_equal(shown[10 * i:10 * i + 8], square, err_msg=f"{axis.get_title()}, {i}")
