"""Text in, token files out, split by document into train and held-out.

Command: python -m experiments.prepare_data --source=FILE_OR_FOLDER --workdir=runs/data --tokenizer=downloads/olmo2-7b
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import common
from rat_jax.data import prepare, prepare_standard_library

SOURCE = common.define_path("source", "Text file or folder. Default: the Python standard library's text.")
PATTERN = flags.DEFINE_string("pattern", "*", "Which files of a folder, for instance *.txt.")
SKIP = flags.DEFINE_list("skip", [], "Names of sub-folders to pass over.")
TOKENIZER = common.define_tokenizer()
HELDOUT = flags.DEFINE_float("heldout", 0.05, "Share of the documents that is held out.")


def main() -> None:
  if SOURCE.value is None:
    common.refuse(("heldout", "pattern", "skip"), "the standard library's text is cut and chosen in one way; give a"
                  " --source too, or leave it out.")
  elif pathlib.Path(SOURCE.value).is_file():
    common.refuse(("pattern", "skip"), f"--source={SOURCE.value} is a single file; give a folder, or leave it out.")
  folder = common.workdir("data")
  if SOURCE.value is None:
    files = prepare_standard_library(folder, TOKENIZER.value)
  else:
    files = prepare(SOURCE.value, folder, heldout=HELDOUT.value, pattern=PATTERN.value, skip=SKIP.value,
                    tokenizer=TOKENIZER.value)
  for name, file in files.items():
    print(f"{file.path}: {file.sidecar.tokens:,} tokens in {file.sidecar.documents:,} documents ({name})")


if __name__ == "__main__":
  common.run(main)
