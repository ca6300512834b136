"""Which of the seeds that are trained side by side are kept, which are spare, and their folders."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from experiments.needles.seeds import MATCHED
from experiments.shared import output
from rat_jax import RATPlusConfig
from rat_jax.train import Checkpoints


def passes(accuracy: np.ndarray, tasks: Sequence[str], leave_at: float) -> np.ndarray:
  """Which seeds pass --leave_at in every task but multivalue, which comes last: bool [seeds] of [seeds, tasks]."""
  counts = np.array([name != "multivalue" or len(tasks) == 1 for name in tasks])
  return accuracy[:, counts].min(axis=1) >= leave_at


def keep(worst: np.ndarray, stragglers: int) -> np.ndarray:
  """Which seeds are no spares, bool [seeds] of their accuracy in the worst task: the first that pass, then the best."""
  order = np.lexsort((np.arange(len(worst)), -np.minimum(worst, MATCHED)))
  kept = np.zeros(len(worst), bool)
  kept[order[:len(worst) - stragglers]] = True
  return kept


def ended(folder: pathlib.Path) -> int:
  """How many models `write` has left there."""
  return sum(bool(Checkpoints(path).steps()) for kind in ("seed", "spare") for path in folder.glob(f"{kind}-*"))


def write(folder: pathlib.Path, config: RATPlusConfig, state: Any, kept: np.ndarray, notes: Sequence[dict[str, Any]],
          accuracy: Sequence[dict[str, float]]) -> None:
  """Every seed as a model of its own, seed-* or spare-*, instead of those that are there; seeds.json has them all.

  Args:
    state: of all seeds, stacked.
    kept: what `keep` gives.
    notes: of every seed's checkpoint, with its "seed".
    accuracy: {task: percent} of every seed.
  """
  for path in (*folder.glob("seed-*"), *folder.glob("spare-*")):
    shutil.rmtree(path)
  every = []
  for kind, chosen in (("seed", kept), ("spare", ~kept)):
    for number, i in enumerate(np.flatnonzero(chosen).tolist()):
      name = f"{kind}-{number}"
      Checkpoints(folder / name).save(jax.tree.map(lambda x, i=i: x[i], state), config, notes[i])
      every.append({"seed": notes[i]["seed"], "folder": name, "accuracy": accuracy[i]})
  output.write_json(folder / "seeds.json", every)
