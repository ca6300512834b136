"""The one rule by which an operation picks its implementation."""

from __future__ import annotations

from collections.abc import Mapping

IMPLEMENTATIONS = ("xla", "pallas_tpu", "mosaic_gpu", "cudnn")


def resolve(operation: str, implementation: str | None, available: Mapping[str, object]) -> str:
  """Returns the name of the implementation to run.

  Args:
    operation: the operation's name, for the message.
    implementation: a name, or None for the first of `available`.
    available: the implementations that the operation has, fastest first.

  Raises:
    ValueError: `implementation` is no known name.
    NotImplementedError: the operation does not have the one that was named.
  """
  if implementation is None:
    return next(iter(available))
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"implementation={implementation!r} is unknown; use None or one of {IMPLEMENTATIONS}.")
  if implementation not in available:
    raise NotImplementedError(
        f"implementation={implementation!r} does not exist for {operation}; it has {tuple(available)}."
        " Pass implementation=None to take the fastest one that serves.")
  return implementation
