"""The small trained model of the needle tests, and what made it:  PYTHONPATH=. python tests/needle_model.py"""

from __future__ import annotations

import functools
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import niah
from rat_jax import RATPlusConfig, RATPlusLM

PATH = pathlib.Path(__file__).parent / "fixtures" / "needles.npz"
COMMAND = ["-m", "experiments.sft_niah", "--seeds=1", "--layers=2", "--width=64", "--heads=2",
           "--tasks=single_2,multikey_1", "--stages=128x32", "--steps=4000", "--dilation=8",
           "--learning_rate=2e-3", "--dtype=float32"]


@functools.cache
def trained() -> tuple[RATPlusLM, Any]:
  """(model, parameters of one seed, stacked): RAT+ of 0.1M parameters that answers single_2 at 128 tokens."""
  with np.load(PATH) as file:
    config = RATPlusConfig.from_json(str(file["config"]))
    params: dict[str, Any] = {}
    for name in file.files:
      if name != "config":
        *folders, last = name.split("/")
        node = functools.reduce(lambda node, folder: node.setdefault(folder, {}), folders, params)
        node[last] = jnp.asarray(file[name].view(jnp.bfloat16).astype(np.float32))[None]
  return RATPlusLM(config), params


def make() -> None:
  """Trains the model and keeps it, in bfloat16."""
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.executable, *COMMAND, f"--workdir={folder}"], check=True)
    config, params = niah.load(folder)
  flat = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf[0], jnp.bfloat16).view(np.uint16)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  np.savez(PATH, config=config.to_json(), **flat)


if __name__ == "__main__":
  make()
