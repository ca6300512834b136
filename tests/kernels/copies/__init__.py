"""Implementations to add in tests: plain JAX under another name, which notes what it is given.

A module of this folder is one implementation, as `table.IMPLEMENTATIONS` wants it.
"""

from __future__ import annotations

import dataclasses

import jax

TAKEN: list[tuple[tuple[int, ...], ...]] = []  # the shapes of the arguments' arrays of every call, the newest last


def copy_of(implementation):
  """The same implementation; every call of it is noted."""

  def run(*arguments, **options):
    TAKEN.append(tuple(x.shape for x in jax.tree.leaves(arguments)))
    return implementation.run(*arguments, **options)

  return dataclasses.replace(implementation, run=run)
