"""Needle tasks in words: read again from the text by an independent reader."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import scipy.stats

from rat_jax.evaluate import load_ruler, text_niah
from rat_jax.evaluate.text_niah import TEXT_TASKS, examples, pseudo_essay, write_jsonl

NEEDLE = re.compile(r"The (?:number|code) kept for (\S+) is ([0-9a-f-]+)\.")
ASKED = re.compile(r"Which (?:number|code)s? (?:is|are) kept for (.+) in the text\?$")


class Bytes:
  def encode(self, text):
    return list(text.encode())


class Words:
  def encode(self, text):
    return [hash(word) for word in re.findall(r"\w+|\W", text)]


class Split:
  """Words between spaces: the coarsest that there is."""

  def encode(self, text):
    return [hash(word) for word in text.split()]


ESSAY = pseudo_essay(0, 3000)


@pytest.mark.parametrize(("tokenizer", "longest_word", "longest_needle"), [(Bytes(), 14, 150), (Words(), 4, 50),
                                                                           (Split(), 1, 7)],
                         ids=["bytes", "words", "split"])
@pytest.mark.parametrize("task", TEXT_TASKS.values(), ids=lambda task: task.name)
def test_every_answer_is_in_its_text(task, tokenizer, longest_word, longest_needle, tmp_path):
  """A prompt is full: a word or a needle more would not fit."""
  step = longest_needle if task.haystack == "needles" else longest_word
  length, depths = 2200, []
  made = examples(task, 12, length, tokenizer, essay=ESSAY, seed=3)
  for one in made:
    prompt = one["input"] + one["answer_prefix"]
    used = len(tokenizer.encode(prompt))
    assert length - 128 - step < used <= length - 128
    assert one["length"] == used + 128
    needles = NEEDLE.findall(one["input"])
    keys = re.split(r", | and ", ASKED.search(one["input"]).group(1))
    assert one["outputs"] == [value for key in keys for found, value in needles if found == key]
    assert len(keys) == len(set(keys)) == task.queries
    assert len(one["outputs"]) == task.queries * task.values
    if task.haystack == "needles":
      assert len({key for key, _ in needles}) == len(needles) > 10
      assert not NEEDLE.sub("", one["input"]).split("\n")[1].strip()
    else:
      assert len(needles) == task.keys * task.values
      assert len({key for key, _ in needles}) == task.keys
    for key, value in needles:
      assert re.fullmatch(r"[a-z]+-[a-z]+" if task.key == "words" else r"[0-9a-f-]{36}", key)
      assert re.fullmatch(r"\d{7}" if task.value == "number" else r"[0-9a-f-]{36}", value)
    depths += [one["input"].index(value) / len(one["input"]) for value in one["outputs"]]
    assert one["token_position_answer"] == len(tokenizer.encode(one["input"][:one["input"].index(one["outputs"][0])]))
  assert 0.25 < np.mean(depths) < 0.75
  assert np.std(depths) > 0.15
  assert scipy.stats.kstest(depths, "uniform").pvalue > 0.01
  assert made[:5] == examples(task, 5, length, tokenizer, essay=ESSAY, seed=3)
  assert made[0]["input"] != examples(task, 1, length, tokenizer, essay=ESSAY, seed=4)[0]["input"]
  write_jsonl(tmp_path / "task.jsonl", made)
  read = load_ruler(tmp_path / "task.jsonl")
  assert [(x.prompt, list(x.answers), x.length) for x in read] == [
      (x["input"] + x["answer_prefix"], x["outputs"], x["length"]) for x in made]


def test_an_essay_without_stops_fills_a_haystack_and_is_read_from_any_place():
  words = [f"w{i}" for i in range(4000)]
  made = examples(TEXT_TASKS["single_2"], 8, 1200, Split(), essay=" ".join(words))
  filler = [NEEDLE.sub("", one["input"].split("\n")[1]).split() for one in made]
  assert all(len(one) > 950 for one in filler)
  starts = [words.index(one[0]) for one in filler]
  assert all(start % 40 == 0 for start in starts)
  assert len(set(starts)) > 4
  with pytest.raises(ValueError, match="no part of the essay fits"):
    examples(TEXT_TASKS["single_2"], 1, 600, Bytes(), essay=2000 * "a" + " " + 2000 * "b")


def test_bad_input(monkeypatch):
  task = TEXT_TASKS["single_2"]
  with pytest.raises(ValueError, match=r"essay of .* fills .* give a longer text"):
    examples(task, 1, 2200, Bytes(), essay="Too short. Really.")
  with pytest.raises(ValueError, match="use a larger length"):
    examples(task, 1, 200, Bytes(), essay=ESSAY)
  with pytest.raises(ValueError, match="more than answer_room=20"):
    examples(TEXT_TASKS["multivalue"], 1, 1200, Bytes(), essay=ESSAY, answer_room=20)
  monkeypatch.setattr(text_niah, "_words", text_niah._words.__wrapped__)
  monkeypatch.setitem(sys.modules, "wonderwords", None)
  with pytest.raises(ImportError, match=r"'\.\[needles\]'"):
    examples(task, 1, 2200, Bytes(), essay=ESSAY)
