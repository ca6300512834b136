"""The documentation is in short sentences."""

from __future__ import annotations

import pytest
from prose import MEAN, Measured, pages, sentences, words


def test_sentences_are_found():
  text = """# A heading of many words that is none

One claim, of `some code` and [a link](x.md). Two claims; a
second line (and a parenthesis).

    code that is none

* An item
* Another. It has two!

| a | table |
```python
none either. Nor this.
```
Is it 3.5 times as fast? Yes."""
  assert sentences(text) == ["One claim, of code and a link.", "Two claims; a second line (and a parenthesis).",
                             "An item", "Another.", "It has two!", "Is it 3.5 times as fast?", "Yes."]
  assert [words(one) for one in ("One claim, of code - and a link.", "3.5 times")] == [7, 2]
  measured = Measured.of(text)
  assert measured.by_length[0][0] == 8
  assert measured.mean == 4


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_sentences_are_short(page):
  measured = Measured.of(page.read_text(encoding="utf-8"))
  assert not measured.too_long()
  assert measured.mean < MEAN
