"""The tables of a released model with a memory and without, from their results."""

from __future__ import annotations

from typing import Any

from experiments.shared.output import markdown_table
from experiments.shared.page_tables import Read, Table

_TASKS = ("multikey_1", "multikey_2")
_MODES = {"dense": "dense", "Quest 16, 1/8": "quest:0.125,block=16", "Quest 16, 1/16": "quest:0.0625,block=16",
          "Quest 64, 1/8": "quest:0.125", "MoBA 16 decode, 1/8": "", "MoBA 64 prompt, 1/8": "moba:0.125",
          "SnapKV, window of 64, 1/8": "snapkv:0.125", "Quest 16, 1/4, random": "", "dilated:16": "dilated:16",
          "dilated:16,window=64,sinks=4": "dilated:16,window=64,sinks=4"}  # of needles: of text
_SWEEP = {"0, D=16 and dense": "b0", "-1, D=16 and dense": "b1", "-2, D=16 and dense": "b2",
          "-1, D=64 and dense": "d64", "-1, dense twice": "dd"}


def first(read: Read) -> str:
  """Control and memory under every mode: needles, and nats for a token of text."""
  found = read("released_first")
  arms = [found["control"], found["memory1"]]
  rows = [[label, *(f"{arm['needles'][label][task]:.1f}" for task in _TASKS for arm in arms),
           *(f"{arm['nats'][mode]:.3f}" if mode else "" for arm in arms)] for label, mode in _MODES.items()]
  header = [f"{one}: {arm}" for one in (*_TASKS, "nats") for arm in ("control", "memory")]
  return markdown_table(["mode", *header], rows)


def sweep(read: Read) -> str:
  """Short runs from several starts."""
  found = read("released_first")
  rows = []
  for label, name in _SWEEP.items():
    nats = [f"{found[name]['nats'][mode]:.3f}" for mode in ("dense", "quest:0.0625,block=16", "dilated:16")]
    rows.append([label, *nats, *(_both(found[name], row) for row in ("Quest 16, 1/16", "MoBA 16 decode, 1/8"))])
  return markdown_table(["bias, updates of a batch", "nats: dense", "Quest 16, 1/16", "dilated:16",
                         "Quest 16, 1/16: multikey_1, 2", "MoBA 16 decode, 1/8"], rows)


def _both(found: dict[str, Any], row: str) -> str:
  return ", ".join(f"{found['needles'][row][task]:.1f}" for task in _TASKS)


TABLES: dict[str, Table] = {"released": first, "released_sweep": sweep}
