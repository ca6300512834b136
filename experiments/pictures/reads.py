"""Who sees whom: the masks of modes, what their caches hold, and what queries chose on a real text."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pictures.canvas import COLOURS, labelled, panels
from rat_jax import visible
from rat_jax.modes import Mode, PerLayer


def masks(modes: Sequence[Mode], length: int = 96) -> Figure:
  """One square for each mode: row t is a query, a dark cell is a key that it reads. A PerLayer has no square."""
  modes = _of_all_layers(modes)
  figure, axes = panels(len(modes), 4, 2.9, 3.2, sharex=True, sharey=True)
  at = np.arange(length)
  for axis, mode in zip(axes, modes, strict=True):
    seen = np.asarray(visible(mode, at, at))
    _square(axis, seen, f"{mode}\n{seen[-1].sum()} of {length} keys read at the end")
  for axis in axes[::4]:
    axis.set_ylabel("query", fontsize=9)
  return figure


def choices(read: Mapping[str, np.ndarray], prompt_length: int) -> Figure:
  """What queries after a prompt chose on a text: {mode: bool [layers, heads, T, S]}, a row of squares for each mode.

  A square is a layer, of which the first head is shown; a dark cell is a key that the query reads.
  """
  layers = len(next(iter(read.values())))
  figure, axes = panels(len(read) * layers, layers, 3.2, 3.4, sharex=True, sharey=True)
  for axis, (mode, layer) in zip(axes, itertools.product(read, range(layers)), strict=True):
    seen = read[mode][layer, 0, prompt_length:]
    title = f"{mode}\nlayer {layer}, head 0: {seen[-1].sum()} of {len(seen[-1])} keys at the end"
    _square(axis, seen, title, prompt_length)
    axis.axvline(prompt_length - 0.5, color=COLOURS[1], linewidth=1)
  for axis in axes[-layers:]:
    axis.set_xlabel("key (the prompt ends at the line)", fontsize=9)
  for axis in axes[::layers]:
    axis.set_ylabel("query", fontsize=9)
  return figure


def _square(axis: Axes, seen: np.ndarray, title: str, first: int = 0) -> None:
  """Queries from `first` on against keys, bool [queries, keys]."""
  queries, keys = seen.shape
  axis.imshow(seen, cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest", aspect="auto",
              extent=(-0.5, keys - 0.5, first + queries - 0.5, first - 0.5))
  axis.set_title(title, fontsize=8)
  axis.set_xlabel("key", fontsize=9)
  axis.tick_params(labelbottom=True)


def one_query(seen: Mapping[str, np.ndarray], needle: tuple[int, int], title: str) -> Figure:
  """What one query reads under every mode: {label: bool [S]}, a row of marks for each; the needle is a bar."""
  figure = _rows_of_marks({f"{label}: {keys.sum()} keys": keys for label, keys in seen.items()}, title)
  axis = figure.axes[0]
  axis.axvspan(needle[0] - 0.5, needle[1] + 0.5, color=COLOURS[1], alpha=0.4, linewidth=0, zorder=0)
  axis.set_xlabel("position of the key (the bar is the value of the needle that is asked for)", fontsize=9)
  return figure


def layers_of_query(seen: Mapping[str, np.ndarray], needle: tuple[int, int]) -> Figure:
  """How many heads of every layer read a key for one query: {mode: shares [layers, keys]}; lines enclose a sentence."""
  figure, axes = panels(len(seen), 1, 9, 2.6, sharex=True)
  for axis, (mode, shares) in zip(axes, seen.items(), strict=True):
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    for edge in (needle[0] - 0.5, needle[1] + 0.5):
      axis.axvline(edge, color=COLOURS[1], linewidth=1)
    inside = shares[:, needle[0]:needle[1] + 1].max(axis=1).mean()
    labelled(axis, "", "layer", f"{mode}: in a layer {inside:.0%} of heads read the sentence")
    axis.grid(False)
  axes[-1].set_xlabel("position of the key (the lines enclose the sentence that answers)", fontsize=9)
  return figure


def caches(modes: Sequence[Mode], length: int) -> Figure:
  """What the caches of modes hold after `length` tokens that came one by one: a row of marks for each mode.

  It is every key that a later query can read. A PerLayer has no row, as its layers' caches differ; what a compression
  keeps of a prompt is shown by `choices`.
  """
  held: dict[Mode, np.ndarray] = {}
  for mode in _of_all_layers(modes):
    later = np.asarray(visible(mode, np.arange(length, 2 * length), np.arange(length)))
    held[mode] = np.any(later, axis=0)
  figure = _rows_of_marks({f"{mode}: {keys.sum()} of {length}": keys for mode, keys in held.items()},
                          f"Keys that are held after {length} tokens")
  figure.axes[0].set_xlabel("position of the key", fontsize=9)
  return figure


def _of_all_layers(modes: Sequence[Mode]) -> list[Mode]:
  """The modes that are the same in every layer, and so have one mask."""
  return [mode for mode in modes if not isinstance(mode, PerLayer)]


def _rows_of_marks(rows: Mapping[str, np.ndarray], title: str) -> Figure:
  """A row for each label, bool [S], with a mark where it is true."""
  figure, (axis,) = panels(1, 1, 9, 0.42 * len(rows) + 1.2)
  for row, keys in enumerate(rows.values()):
    marks = [(key - 0.5, 1) for key in np.flatnonzero(keys)]
    axis.broken_barh(marks, (row - 0.32, 0.64), color=COLOURS[0], linewidth=0)
  labelled(axis, "", title=title)
  axis.grid(False)
  axis.set_yticks(range(len(rows)), list(rows))
  axis.set_xlim(-0.5, len(next(iter(rows.values()))) - 0.5)
  axis.invert_yaxis()
  return figure
