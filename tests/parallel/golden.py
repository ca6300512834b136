"""How meshes cut every array of the presets, as text: `python -m parallel.golden` writes the files of golden/ anew."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

import rat_jax
from rat_jax import Dense, Dilated, Quest, RATPlusConfig, RATPlusLM, SnapKV
from rat_jax.caches.cache import empty_cache
from rat_jax.config import _PRESETS
from rat_jax.parallel import AXES, rules, shardings
from rat_jax.parallel.mesh import sizes_of

FOLDER = pathlib.Path(__file__).parent / "golden"
PRESETS = tuple(_PRESETS)
# (text, devices)
MESHES = {"fsdp:8": 8, "data:2,fsdp:2,tensor:2": 8, "data:2,tensor:2,context:2": 8, "tensor:8": 8,
          "data:4,fsdp:64": 256, "fsdp:32,tensor:8": 256, "fsdp:16,context:16": 256}
ROWS, LENGTH = 256, 4096


def text_of(preset: str) -> str:
  """What stands in the preset's file: for every mesh, each array with its shape and what cuts its axes."""
  config = RATPlusConfig.preset(preset)
  model, optimizer = RATPlusLM(config), rat_jax.make_optimizer(1e-3, total_steps=2)
  state = jax.eval_shape(lambda: rat_jax.init_train_state(
      model, model.init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"], optimizer))
  tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
  trees = {"state": state, "batch": {"tokens": tokens, "targets": tokens, "segment_ids": tokens}}
  for mode in (Dense(), Dilated(64, window=64, sinks=4), Quest(0.0625), SnapKV(0.0625)):
    trees[f"cache {mode}"] = jax.eval_shape(
        lambda mode=mode: empty_cache(config, mode, ROWS, LENGTH, prompt_width=LENGTH // 2))
  lines: list[str] = []
  for mesh, count in MESHES.items():
    lines += [f"mesh {mesh}"]
    for name, tree in trees.items():
      lines += [f"  {name}", *sorted({f"    {line}" for line in _lines(tree, mesh, count)})]
  return "\n".join(lines) + "\n"


def _lines(tree, text, count):
  mesh = AbstractMesh(sizes_of(text, count), AXES, (AxisType.Auto,) * len(AXES))
  try:
    placed = shardings(tree, mesh)
  except ValueError as error:
    yield f"refused: {error}"
    return
  for (path, leaf), place in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(placed), strict=True):
    cuts = ["*".join((axes,) if isinstance(axes, str) else axes) if axes else "-" for axes in place.spec]
    yield f"{rules.name_of(path)} {list(leaf.shape)}: {' '.join(cuts) or 'whole'}"


if __name__ == "__main__":
  FOLDER.mkdir(exist_ok=True)
  for preset in PRESETS:
    (FOLDER / f"{preset}.txt").write_text(text_of(preset), encoding="utf-8")
