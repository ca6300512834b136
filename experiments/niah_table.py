"""The rows of the needle tables: which mode, at which budget, with which prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from rat_jax import Dense, Dilated, DilatedTopK, MoBA, Quest, SnapKV, StreamingLLM
from rat_jax.evaluate.mini_niah import Task
from rat_jax.modes import BlockMode, Mode


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    label: family, budget and what is special, such as "Quest 16, 1/8, first".
    build: (mode, prefill_mode) for a task, None for the mode's own form; ValueError where no such mode can be built.
    at_answer: the prompt ends at the answer (p = index of ANS + 1) rather than at the question (p = index of QRY).
  """

  label: str
  build: Callable[[Task], tuple[Mode, Mode | None]]
  at_answer: bool = False


def main_rows(length: int) -> list[Row]:
  """The rows of the main table, at sequences of `length` tokens."""
  rows = [Row("dense", lambda task: (Dense(), None))]

  def fixed(label: str, build: Callable[[], Mode], prefill_mode: Mode | None = None) -> None:
    rows.append(Row(label, lambda task: (_choosing(build(), length), prefill_mode)))

  def paper(label: str, build: Callable[[], Mode]) -> None:
    rows.append(Row(label, lambda task: (Dense(), _choosing(build(), length)), at_answer=True))

  def aware(label: str, budget: int, **options: Any) -> None:
    rows.append(Row(label, lambda task: (SnapKV(budget, obs_window=task.query_length, **options), None),
                    at_answer=True))

  for block in (16, 8):
    for n in (4, 8, 16, 32):
      for first in (False, True):
        fixed(f"Quest {block}, 1/{n}{', first' if first else ''}",
              functools.partial(Quest, length // n, block=block, keep_first=first))
  for block, n in [*((16, n) for n in (4, 8, 16, 32)), (32, 4), (32, 8), (32, 16)]:
    for first in (False, True):
      moba, end = functools.partial(MoBA, length // n // block, block=block, keep_first=first), ", first" * first
      fixed(f"MoBA {block} decode, 1/{n}{end}", moba, Dense())
      paper(f"MoBA {block} prompt, 1/{n}{end}", moba)
    fixed(f"MoBA {block} everywhere, 1/{n}", functools.partial(MoBA, length // n // block, block=block,
                                                              keep_first=False))
  for n in (4, 8, 16, 32):
    aware(f"SnapKV aware, 1/{n}", length // n)
    fixed(f"SnapKV blind, 1/{n}", functools.partial(SnapKV, length // n, obs_window=8))
  for n in (4, 16):
    for selector in ("random", "oracle"):
      fixed(f"Quest 16, 1/{n}, {selector}", functools.partial(Quest, length // n, block=16, keep_first=False,
                                                               selector=selector))
      fixed(f"MoBA 16 decode, 1/{n}, {selector}", functools.partial(
          MoBA, length // n // 16, block=16, keep_first=False, selector=selector), Dense())
      aware(f"SnapKV aware, 1/{n}, {selector}", length // n, selector=selector)
  for top_k in (4, 8):
    fixed(f"DilatedTopK 16, {top_k} blocks", functools.partial(DilatedTopK, 16, top_k))
  for mode in (Dilated(8), Dilated(16), Dilated(32), Dilated(16, window=32), StreamingLLM(60, 4)):
    fixed(f"{mode} everywhere", functools.partial(dataclasses.replace, mode))
  fixed("dilated:16 question rows", lambda: Dilated(16), Dense())
  return rows


def _choosing(mode: Mode, length: int) -> Mode:
  """The mode. Raises ValueError where its budget is spent on forced blocks: there would be nothing to choose."""
  if isinstance(mode, BlockMode) and mode.blocks_at(length) <= mode.forced_at(length):
    raise ValueError(f"{mode} has a budget of {mode.blocks_at(length)} blocks, all of them forced: nothing to choose.")
  return mode
