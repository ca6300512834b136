"""How long the sentences of the documentation are. Prints it by file:  python tests/prose.py [FILE ...]"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
MEAN, MOST = 20, 45  # words of a sentence: below the first in the mean of a file, up to the second in each


def pages() -> list[pathlib.Path]:
  """The pages that are held to it."""
  return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "experiments").rglob("*.md")),
          *(path for path in (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md") if path.exists())]


def sentences(text: str) -> list[str]:
  """The sentences of a Markdown text, without code blocks, tables, headings and pictures.

  A paragraph and an item of a list end a sentence; a link is its text, code in a line is one word.
  """
  text = re.sub(r"^(```.*?^```|<!--.*?-->)", "\n", text, flags=re.S | re.M)
  blocks, block = [], []
  for line in text.splitlines():
    item = re.match(r"\s*([*-]|\d+\.)\s+", line)
    if not line.strip() or item or re.match(r"(    |\||#|!\[)", line):
      blocks.append(" ".join(block))
      block = [line[item.end():]] if item else []
    else:
      block.append(line.strip())
  blocks.append(" ".join(block))
  found = []
  for block in blocks:
    block = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", block)
    block = re.sub(r"`[^`]*`", "code", block)
    found += re.split(r"(?<=[.!?])[)\"]?\s+(?=[A-Z(\"*]|code\b)", block)
  return [sentence.strip() for sentence in found if re.search(r"\w", sentence)]


def words(sentence: str) -> int:
  """How many words a sentence has; a figure is one."""
  return sum(1 for word in sentence.split() if re.search(r"\w", word))


@dataclasses.dataclass(frozen=True)
class Measured:
  """A page: its sentences with their words, the longest first."""

  by_length: tuple[tuple[int, str], ...]

  @classmethod
  def of(cls, text: str) -> Measured:
    return cls(tuple(sorted(((words(one), one) for one in sentences(text)), reverse=True)))

  @property
  def mean(self) -> float:
    return sum(count for count, _ in self.by_length) / max(1, len(self.by_length))

  def too_long(self) -> list[tuple[int, str]]:
    return [(count, sentence) for count, sentence in self.by_length if count > MOST]


def main(files: list[str]) -> None:
  for path in map(pathlib.Path, files) if files else pages():
    measured = Measured.of(path.read_text(encoding="utf-8"))
    print(f"{path}: {len(measured.by_length)} sentences, {measured.mean:.1f} words in the mean,"
          f" {len(measured.too_long())} above {MOST}")
    if files:
      for count, sentence in measured.by_length[:20]:
        print(f"  {count}: {sentence}")


if __name__ == "__main__":
  main(sys.argv[1:])
