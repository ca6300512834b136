"""The small trained model of the needle tests, and what makes it:  PYTHONPATH=. python tests/needle_model.py"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rat_jax
from experiments import niah
from rat_jax import RATPlusLM

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "needles"
COMMAND = ["-m", "experiments.sft_niah", "--seeds=1", "--layers=2", "--width=64", "--heads=2",
           "--tasks=single_2,multikey_1", "--stages=128x32", "--steps=4000", "--dilation=8", "--learning_rate=2e-3",
           "--dtype=float32"]


@functools.cache
def trained() -> tuple[RATPlusLM, Any]:
  """(model, parameters of one seed, stacked): RAT+ of 0.1M parameters that answers single_2 at 128 tokens."""
  config, params = rat_jax.load_pretrained(FOLDER)
  return (RATPlusLM(dataclasses.replace(config, param_dtype="float32")),
          jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32)[None], params))


def make() -> None:
  """Trains the model and keeps it, in bfloat16."""
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run([sys.executable, *COMMAND, f"--workdir={folder}"], check=True)
    config, params = niah.load(folder)
  shutil.rmtree(FOLDER)
  rat_jax.save_pretrained(FOLDER, dataclasses.replace(config, param_dtype="bfloat16"),
                          jax.tree.map(lambda leaf: np.asarray(leaf[0], jnp.bfloat16), params),
                          about={"made by": "tests/needle_model.py"})


if __name__ == "__main__":
  make()
