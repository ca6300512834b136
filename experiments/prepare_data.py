"""Text in, token files out, split by document into train and held-out.

Claim: no document is in both parts, and the same text gives the same files.
Command: python -m experiments.prepare_data --source=FILE_OR_FOLDER --workdir=runs/data --tokenizer=downloads/olmo2-7b
Result: train.bin and heldout.bin, with sidecars that name source, tokenizer and digest.
Cost: 3 seconds for 9 million bytes of Python's standard library.
--debian takes the text of three of Debian's packages of documentation, and the standard library, and records them.
"""

from __future__ import annotations

import dataclasses
import pathlib

from absl import flags

from experiments.shared import command, debian_text, output
from rat_jax.data import Tokenizer, prepare, prepare_standard_library


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  source: pathlib.Path | None
  debian: bool
  pattern: str
  skip: tuple[str, ...]
  tokenizer: Tokenizer
  heldout: float


def define_flags() -> None:
  command.define_common_flags("data")
  command.define_path("source", "Text file or folder. Default: the Python standard library's text.")
  flags.DEFINE_bool("debian", False, "The text of Debian's linux-doc, python3-doc and dict-gcide, which apt-get"
                    " fetches, and of the standard library.")
  flags.DEFINE_string("pattern", "*", "Which files of a folder, for instance *.txt.")
  flags.DEFINE_list("skip", [], "Names of sub-folders to pass over.")
  command.define_tokenizer()
  flags.DEFINE_float("heldout", 0.05, "Share of the documents that is held out.")


def main(settings: Settings) -> None:
  source, folder = settings.source, settings.workdir
  if settings.debian:
    settings.refuse(("source", "pattern", "skip"), "--debian has sources of its own; leave it out.")
    source = output.made(folder) / "text"
    sources, left_out = debian_text.collect(source)
    output.write_json(folder / "sources.json", {"sources": sources})
    print(*(f"{one['source']}: {one['bytes']:,} bytes in {one['files']:,} files" for one in sources), *left_out,
          sep="\n", flush=True)
  if source is None:
    settings.refuse(("heldout", "pattern", "skip"), "the standard library's text is cut and chosen in one way; give a"
                    " --source too, or leave it out.")
    files = prepare_standard_library(folder, settings.tokenizer)
  else:
    if source.is_file():
      settings.refuse(("pattern", "skip"), f"--source={source} is a single file; give a folder, or leave it out.")
    files = prepare(source, folder, heldout=settings.heldout, pattern=settings.pattern,
                    skip=settings.skip, tokenizer=settings.tokenizer)
  for name, file in files.items():
    print(f"{file.path}: {file.sidecar.tokens:,} tokens in {file.sidecar.documents:,} documents ({name})")


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
