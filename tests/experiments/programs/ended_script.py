"""A script that is ended while it writes a folder: ended_script.py FOLDER."""

from __future__ import annotations

import os
import signal
import sys

from experiments.shared import command
from rat_jax.convert.tensors import new_folder

folder = sys.argv.pop()


def main(settings):
  del settings
  with new_folder(folder) as made:
    (made / "half").write_text("")
    os.kill(os.getpid(), signal.SIGTERM)
  print("not reached")


command.run(main, command.Settings, lambda: command.define_common_flags("ended"))
