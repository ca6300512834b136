"""The rows of the needle tables: which mode, at which budget, with which prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from rat_jax import Dense, Dilated, DilatedTopK, MoBA, Quest, SnapKV, StreamingLLM, TopK
from rat_jax.modes import BlockMode, Mode


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a table.

  Attributes:
    label: family, budget and what is special, such as "Quest 16, 1/8, first".
    build: (mode, prefill_mode) for a question of so many tokens, None for the mode's own form; ValueError where no such
      mode can be built.
    at_answer: the prompt ends at the answer (p = index of ANS + 1) rather than at the question (p = index of QRY).
    at_question: it must end at the question: what it shows is not there otherwise.
  """

  label: str
  build: Callable[[int], tuple[Mode, Mode | None]]
  at_answer: bool = False
  at_question: bool = False


def blank(error: ValueError, length: int) -> dict[str, str]:
  """The cell of a row that cannot be built for sequences of `length` tokens, and why."""
  return {"blank": f"at T={length}: {error}"}


# Rows that are also decoded greedily.
CHECKED = ("dense", "Quest 16, 1/8", "MoBA 16 decode, 1/8", "MoBA 16 prompt, 1/8", "SnapKV aware, 1/8",
           "SnapKV blind, 1/4", "Quest 16, 1/4, random", "DilatedTopK 16, 4 blocks", "TopK, 1/8",
           "dilated:16 everywhere", "streaming_llm:60 everywhere", "Quest 64, 1/8, first", "MoBA 64 prompt, 1/8, first",
           "SnapKV, window of 64, 1/8")


def main_rows(length: int) -> list[Row]:
  """The rows of the main table, at sequences of `length` tokens."""
  step = functools.partial(_decoded, length)
  rows = [step("dense", Dense)]
  for block in (16, 8):
    for n in (4, 8, 16, 32):
      for first in (False, True):
        rows.append(step(f"Quest {block}, 1/{n}{', first' * first}", Quest, length // n, block=block, keep_first=first))
  for block, n in [*((16, n) for n in (4, 8, 16, 32)), (32, 4), (32, 8), (32, 16)]:
    for first in (False, True):
      moba, end = functools.partial(MoBA, length // n // block, block=block, keep_first=first), ", first" * first
      rows.append(step(f"MoBA {block} decode, 1/{n}{end}", moba, prefill_mode=Dense()))
      rows.append(_prompt(length, f"MoBA {block} prompt, 1/{n}{end}", moba))
  for n in (4, 8):
    rows.append(step(f"MoBA 16 everywhere, 1/{n}", MoBA, length // n // 16, block=16, keep_first=False))
  for n in (4, 8, 16, 32):
    rows.append(_aware(f"SnapKV aware, 1/{n}", length // n))
    rows.append(dataclasses.replace(step(f"SnapKV blind, 1/{n}", SnapKV, length // n, obs_window=8),
                                    at_question=True))
  for n in (4, 16):
    for selector in ("random", "oracle"):
      rows.append(step(f"Quest 16, 1/{n}, {selector}", Quest, length // n, block=16, keep_first=False,
                       selector=selector))
      rows.append(step(f"MoBA 16 decode, 1/{n}, {selector}", MoBA, length // n // 16, block=16, keep_first=False,
                       selector=selector, prefill_mode=Dense()))
      moba = functools.partial(MoBA, length // n // 16, block=16, keep_first=False, selector=selector)
      rows.append(_prompt(length, f"MoBA 16 prompt, 1/{n}, {selector}", moba))
      rows.append(_aware(f"SnapKV aware, 1/{n}, {selector}", length // n, selector=selector))
      rows.append(dataclasses.replace(step(f"SnapKV blind, 1/{n}, {selector}", SnapKV, length // n, obs_window=8,
                                           selector=selector), at_question=True))
  for top_k in (4, 8):
    rows.append(step(f"DilatedTopK 16, {top_k} blocks", DilatedTopK, 16, top_k))
  for n in (4, 8, 16, 32):
    rows.append(step(f"TopK, 1/{n}", TopK, length // n))
  for mode in (Dilated(8), Dilated(16), Dilated(32), Dilated(16, window=32), StreamingLLM(60, 4)):
    rows.append(step(f"{mode} everywhere", dataclasses.replace, mode))
  rows.append(dataclasses.replace(step("dilated:16 question rows", Dilated, 16, prefill_mode=Dense()),
                                  at_question=True))
  return rows


def paper_rows(length: int) -> list[Row]:
  """The rows of the paper's tables (arXiv 2605.28640): the first block kept, and the same without."""
  rows = [_decoded(length, "dense", Dense)]
  for first in (True, False):
    end = ", first" * first
    for block, n in ((64, 4), (64, 8), (64, 16), (16, 64)):
      rows.append(_decoded(length, f"Quest {block}, 1/{n}{end}", Quest, length // n, block=block, keep_first=first))
    for block, n in ((64, 4), (64, 8), (64, 16), (128, 4), (128, 8)):
      moba = functools.partial(MoBA, length // n // block, block=block, keep_first=first)
      rows.append(_prompt(length, f"MoBA {block} prompt, 1/{n}{end}", moba))
  for n in (4, 8, 16):
    snapkv = functools.partial(SnapKV, length // n, obs_window=64)
    rows.append(dataclasses.replace(_decoded(length, f"SnapKV, window of 64, 1/{n}", snapkv), at_answer=True))
    rows.append(_aware(f"SnapKV aware, 1/{n}", length // n))
  return rows


def retrofit_rows(length: int) -> list[Row]:
  """The rows of the retrofit of a released model: modes with a dense prompt, MoBA in the prompt, and dilation."""
  step = functools.partial(_decoded, length)
  rows = [step("dense", Dense)]
  for block, shares in ((64, (4, 8, 16)), (16, (4, 8, 16, 64))):
    rows += [step(f"Quest {block}, 1/{n}", Quest, length // n, block=block, keep_first=False) for n in shares]
  for block, shares in ((64, (4, 8, 16)), (16, (4, 8, 16))):
    for n in shares:
      moba = functools.partial(MoBA, length // n // block, block=block, keep_first=False)
      rows.append(step(f"MoBA {block} decode, 1/{n}", moba, prefill_mode=Dense()))
      rows.append(_prompt(length, f"MoBA {block} prompt, 1/{n}", moba))
  for window in (64, 16):
    rows += [step(f"SnapKV, window of {window}, 1/{n}", SnapKV, length // n, obs_window=window) for n in (4, 8, 16)]
  rows += [step(f"TopK, 1/{n}", TopK, length // n) for n in (4, 8, 16)]
  rows.append(step("Quest 16, 1/4, random", Quest, length // 4, block=16, keep_first=False, selector="random"))
  for d in (4, 16):
    rows += [step(str(mode), dataclasses.replace, mode) for mode in (Dilated(d), Dilated(d, window=64, sinks=4))]
  return [dataclasses.replace(row, at_answer=True) for row in rows]


def _decoded(length: int, label: str, build: Callable[..., Mode], *arguments: Any, prefill_mode: Mode | None = None,
             **options: Any) -> Row:
  return Row(label, lambda question: (_choosing(build(*arguments, **options), length), prefill_mode))


def _prompt(length: int, label: str, build: Callable[[], Mode]) -> Row:
  """The mode in the prompt, and dense steps after it."""
  return Row(label, lambda question: (Dense(), _choosing(build(), length)), at_answer=True)


def _aware(label: str, budget: int, **options: Any) -> Row:
  """SnapKV with the question as its window."""
  return Row(label, lambda question: (SnapKV(budget, obs_window=question, **options), None), at_answer=True)


def _choosing(mode: Mode, length: int) -> Mode:
  """The mode. Raises ValueError where its budget is spent on forced blocks: there would be nothing to choose."""
  if isinstance(mode, BlockMode) and mode.blocks_at(length) <= mode.forced_at(length):
    raise ValueError(f"{mode} has a budget of {mode.blocks_at(length)} blocks, all of them forced: nothing to choose.")
  return mode
