"""What one of several processes finds when checkpoints break, as JSON; `test_processes` starts two of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import sys
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax import RATPlusConfig, RATPlusLM, init_train_state, load_pretrained, make_optimizer, save_pretrained
from rat_jax.parallel import make_mesh, processes, sharded, start_processes
from rat_jax.train import Checkpoints, array_files

CONFIG = RATPlusConfig(512, 1, 64, 2)  # of smaller arrays, the parts lie in what lists them


def fresh_state(mesh, config=CONFIG):
  def made(key):
    model = RATPlusLM(config)
    return init_train_state(model, model.init(key, np.zeros((1, 4), np.int32))["params"],
                            make_optimizer(1e-2, total_steps=20, warmup_steps=2))

  return sharded(made, mesh)(jax.random.key(0))


def tried(act):
  """What comes of it: a value, or the name and text of an error, and what was warned of."""
  with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    try:
      found = act()
    except Exception as error:
      found = [type(error).__name__, str(error)]
  processes.together(lambda: None)  # all have tried
  return [found, [str(one.message) for one in warned if "DAMAGED" in str(one.message)]]


def failing(owner, name, error, of_rank):
  """`owner.name` fails with an error in the processes that `of_rank` has the text of one for."""
  text = of_rank.get(jax.process_index())
  return mock.patch.object(owner, name, side_effect=error(text)) if text else contextlib.nullcontext()


def main(folder, of_version_0_1):
  start_processes()
  mesh = make_mesh("fsdp:4")
  state = fresh_state(mesh)
  checkpoints = Checkpoints(folder / "saved", keep=3)
  at = lambda step: dataclasses.replace(state, step=jnp.full_like(state.step, step))
  names = lambda: sorted(path.name for path in checkpoints.folder.iterdir())
  restored = lambda: int(checkpoints.restore(state, CONFIG)[0].step)
  saved = lambda step: checkpoints.save(at(step), CONFIG, {})
  found = {}

  def case(name, act):
    found[name] = tried(act) + [names()]

  for step in range(3):
    saved(step)
  case("intact", checkpoints.verify)
  with failing(array_files, "write", OSError, {1: "No space left on device"}):
    case("a full disk of the second", lambda: saved(3))
  with failing(array_files, "finish", OSError, {0: "No space left on device"}):
    case("a full disk of the first", lambda: saved(2))
  with failing(pathlib.Path, "rename", OSError, {0: "Stale file handle"}):
    case("a rename that fails", lambda: saved(2))
  with failing(array_files, "read", ValueError, {0: "DATA_LOSS: broken", 1: "PERMISSION_DENIED: not yours"}):
    case("not now", restored)
  with failing(json, "loads", ValueError, {1: "no JSON"}):
    case("none that one can read", restored)
  if processes.is_first():
    for data in (checkpoints.folder / "2" / "state" / "ocdbt.process_1" / "d").iterdir():
      data.unlink()
  processes.together(lambda: None)
  case("damaged", checkpoints.verify)
  case("walk back", restored)
  case("save again", lambda: saved(2))

  old = Checkpoints(of_version_0_1)
  config, params, _ = old.load_params()
  _, on_mesh, _ = old.load_params(make_mesh("fsdp:4"))
  whole = jax.tree.map(processes.on_host, on_mesh)
  found["version 0.1"] = [all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, params))),
                          int(old.restore(fresh_state(mesh, config), config)[0].step)]
  model = [tried(lambda: save_pretrained(folder / "model", CONFIG, state.params))[0] for _ in range(2)]
  kept = load_pretrained(folder / "model")[1]
  same = jax.tree.map(np.array_equal, jax.tree.map(processes.on_host, state.params), kept)
  found["a folder of the model"] = [model[0], all(jax.tree.leaves(same)), model[1]]
  print("FOUND" + json.dumps(found), flush=True)


if __name__ == "__main__":
  main(*map(pathlib.Path, sys.argv[1:]))
