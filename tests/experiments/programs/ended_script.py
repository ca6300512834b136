"""A script that is ended while it writes a folder: ended_script.py FOLDER."""

from __future__ import annotations

import os
import signal
import sys

from experiments import common
from rat_jax.convert.tensors import new_folder

folder = sys.argv.pop()


def main():
  with new_folder(folder) as made:
    (made / "half").write_text("")
    os.kill(os.getpid(), signal.SIGTERM)
  print("not reached")


common.run(main)
