"""Settings of a command as its command line makes them, in this process."""

from __future__ import annotations

import contextlib

from absl import flags

from experiments.shared.command import settings_of


@contextlib.contextmanager
def flags_of(define_flags, *arguments):
  """absl's flags with those of a command, parsed where there are arguments; afterwards they are as they were."""
  before = set(flags.FLAGS)
  define_flags()
  try:
    if arguments:
      flags.FLAGS(["command", *arguments])
    yield
  finally:
    flags.FLAGS.remove_flag_values(set(flags.FLAGS) - before)


def settings(command, *arguments):
  """The `Settings` of a command, a module of experiments/, for arguments such as "--steps=3"."""
  with flags_of(command.define_flags, *arguments):
    return settings_of(command.Settings)
