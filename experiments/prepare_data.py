"""Text in, token files out, split by document into train and held-out.

Command: python -m experiments.prepare_data --source=FILE_OR_FOLDER --workdir=runs/data --tokenizer=downloads/olmo2-7b
"""

from __future__ import annotations

from absl import flags

from experiments import common
from rat_jax.data import prepare, prepare_standard_library

SOURCE = flags.DEFINE_string("source", None, "Text file or folder. Default: the Python standard library's text.")
PATTERN = flags.DEFINE_string("pattern", "*", "Which files of a folder, for instance *.txt.")
SKIP = flags.DEFINE_list("skip", [], "Names of sub-folders to pass over.")
TOKENIZER = common.define_tokenizer()
HELDOUT = flags.DEFINE_float("heldout", 0.05, "Share of the documents that is held out.")


def main() -> None:
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
