"""Needles planted among a text's tokens, who answers them, and text from Debian's packages."""

from __future__ import annotations

import gzip
import json
import re

import jax
import numpy as np
import pytest
import tokenizers
from command_line import settings

import rat_jax
from conftest import run_python
from experiments import eval_niah, retrofit
from experiments.needles import planted, planted_answers, rows
from experiments.shared import debian_text
from rat_jax import Dense, MoBA, Quest, RATPlusConfig, RATPlusLM, SnapKV
from rat_jax.data import BYTES, load_tokenizer, prepare
from rat_jax.train.loss import IGNORED

NEEDLE = re.compile(r"\nThe special magic number for ([a-z]+ [a-z]+|\d+) is: (\d+)\.")
QUESTION = re.compile(r"\nThe special magic numbers? for ([a-z0-9, ]+) (?:is|are): ([\d, ]+)$")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """A tokenizer that has the words of needles and single digits, and a text that was prepared with it."""
  found = tmp_path_factory.mktemp("planted")
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
  made.decoder = tokenizers.decoders.ByteLevel()
  sample = " ".join(["", *planted.ADJECTIVES, *planted.NOUNS, "special magic number numbers for is are"])
  made.train_from_iterator([sample] * 3, tokenizers.trainers.BpeTrainer(
      vocab_size=1500, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      special_tokens=["<|endoftext|>"]))
  made.save(str(found / "tokenizer.json"))
  draw = np.random.default_rng(0)
  text = "\n".join(" ".join(draw.choice(["rain", "falls", "lamp", "12", "a", "door."], 30)) for _ in range(400))
  (found / "text.txt").write_text(text)
  prepare(found / "text.txt", found / "data", heldout=0.3, tokenizer=load_tokenizer(found))
  return found


@pytest.fixture(scope="session")
def tokenizer(folder):
  return load_tokenizer(folder)


@pytest.fixture(scope="session")
def words(tokenizer):
  return planted.words_of(tokenizer)


@pytest.mark.parametrize("name", planted.TASKS)
@pytest.mark.parametrize("asked", [1, 3])
def test_a_row_asks_what_is_in_its_text(tokenizer, words, name, asked):
  task, length, text = planted.TASKS[name], 700, np.array(tokenizer.encode("Rain falls on a lamp.\n" * 200))
  row = planted.row(words, task, text, length, asked, np.random.default_rng(3))
  said = tokenizer.decode(row["tokens"].tolist())
  lines = NEEDLE.findall(said)
  needles = {key: [value for other, value in lines if other == key] for key, _ in lines}
  if task.values * task.queries == 1:  # a question with its answer has the form of a needle
    needles = {key: values[:1] for key, values in needles.items()}
  full = task.haystack == "needles"
  assert len(needles) == task.keys or full
  assert all(len(values) == task.values for values in needles.values())
  keys, answers = QUESTION.search(said).groups()
  expected = [value for key in keys.split(", ") for value in needles[key]]
  assert answers.split(", ") == expected
  digits = "".join(expected)
  assert tokenizer.decode(row["targets"][row["answers"]].tolist()).endswith(digits)
  assert row["answers"].sum() == asked * len(digits)
  np.testing.assert_array_equal(row["tokens"][row["golden"][row["answers"]]], row["targets"][row["answers"]])
  assert (row["golden"][row["answers"]] < row["answers"].argmax()).all()
  np.testing.assert_array_equal(row["targets"], [*row["tokens"][1:], IGNORED])
  assert tokenizer.decode(row["tokens"][row["start"]:].tolist()).strip() == ", ".join(expected)
  again = planted.row(words, task, text, length, asked, np.random.default_rng(3))
  assert all((again[one] == row[one]).all() for one in row)


def test_what_is_planted_in_a_batch(words):
  tokens = np.arange(4 * 500).reshape(4, 500).astype(np.int32)
  batch = {"tokens": tokens, "targets": tokens + 1}
  tasks = [planted.TASKS[name] for name in ("multikey_1", "multikey_2")]
  made = planted.into_batch(words, tasks, 4.0, 0, 7, batch)
  for name in ("tokens", "targets"):
    np.testing.assert_array_equal(made[name][:2], batch[name][:2])
  np.testing.assert_array_equal(made["weights"][:2], 1)
  np.testing.assert_array_equal(np.unique(made["weights"][2:]), [0, 4])
  assert (made["weights"][2:].sum(axis=1) == 4 * 8 * 7).all()
  in_text = np.isin(made["tokens"][2], tokens[2])
  np.testing.assert_array_equal(made["tokens"][2][in_text], tokens[2, :in_text.sum()])  # the text, with needles in it
  other = planted.into_batch(words, tasks, 4.0, 0, 8, batch)
  assert (other["tokens"][3] != made["tokens"][3]).any()


MODES = [(Dense(), None), (Quest(64, block=16), None), (Dense(), MoBA(4, block=16)), (SnapKV(64, obs_window=16), None)]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_who_answers(words, mode):
  """The answer's steps are those of the whole sequence under the mode."""
  model = RATPlusLM(RATPlusConfig(1500, 2, 32, 2, init_std=0.3))
  params = model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  task, length, most = planted.TASKS["multikey_1"], 400, 20
  texts = np.random.default_rng(0).integers(0, 1500, (3, length))
  made = planted.rows(words, [task] * 3, texts, 0, 0, length, questions=1)
  answer = planted.lengths(words, task).answer
  logits = model.apply({"params": params}, made["tokens"], mode=mode[0], prefill_mode=mode[1],
                       prompt_lengths=np.full(3, length - answer))
  targets = np.array(np.argmax(logits, axis=-1))
  targets[1, length - 3] += 1  # one digit of an answer
  right = planted_answers._right(model, *mode, most, params, made["tokens"], targets, made["answers"], answer,
                                 np.arange(3))
  assert right.tolist() == [True, False, True]


def test_cells_of_planted_needles(folder, words):
  model = RATPlusLM(RATPlusConfig(1500, 1, 32, 2))
  params = model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  text = rat_jax.data.TokenFile(folder / "data" / "heldout.bin")
  asked = planted_answers.Asked(words, text, 512, count=3, batch_size=2, seed=5)
  table = {row.label: row for row in rows.retrofit_rows(512)}
  tasks = [planted.TASKS[name] for name in ("multikey_2", "multivalue")]
  found = planted_answers.cells(asked, model, params, table["Quest 16, 1/4"], tasks)
  assert {name: (cell["count"], cell["tokens_read"]) for name, cell in found.items()} == {
      "multikey_2": (3, 128), "multivalue": (3, 128)}
  blank = planted_answers.cells(asked, model, params, table["Quest 64, 1/16"], tasks)
  assert "all of them forced" in blank["multikey_2"]["blank"] or "budget" in blank["multikey_2"]["blank"]
  one, other = (asked.sequences(task)["tokens"] for task in tasks)
  assert (asked.sequences(tasks[0])["tokens"] == one).all()
  assert (one[:, :50] != other[:, :50]).any()


def test_tokenizers_and_tasks_that_do_not_fit(folder, tokenizer, words):
  with pytest.raises(ValueError, match=r"--tokenizer=bytes: of 44 short words 0 are single tokens, and 30 are needed"):
    planted.words_of(BYTES)
  with pytest.raises(ValueError, match="' 17' and others like it are not equally many tokens"):
    words.spell([" 17", " 8"])
  with pytest.raises(ValueError, match=r"length=200 leaves -?\d+ tokens to multikey_1 with 8 questions"):
    planted.row(words, planted.TASKS["multikey_1"], np.zeros(200, int), 200, 8, np.random.default_rng(0))
  data = rat_jax.data.TokenFile(folder / "data" / "train.bin")
  for given, message in (
      (["--needles=nothing"], r"--needles=nothing: \['nothing'\] are unknown; use some of"),
      (["--needles=multikey_1", "--documents_apart"], "--documents_apart: --needles has rows in which a question is"),
      (["--needle_weight=2"], "--needle_weight: it is of --needles; give some, or leave it out."),
      (["--needles=multikey_1,multikey_2", "--batch_size=2"], "takes 2 rows of --batch_size=2; give fewer"),
      (["--needles=multikey_1"], r"--tokenizer=bytes is bytes, and --data was prepared with .*; give that")):
    with pytest.raises(ValueError, match=message):
      retrofit.planting(settings(retrofit, *given), data)


def test_flags_that_planted_needles_have_not():
  ask = ["--checkpoint=x", "--haystack=y"]
  for given, message in ((["--tasks=vt"], r"--tasks=vt: \['vt'\] are unknown"),
                         (["--text"], "--text: --haystack plants needles of its own"),
                         (["--spacing=3"], "--spacing: --haystack plants")):
    with pytest.raises(ValueError, match=message):
      eval_niah.check(settings(eval_niah, *ask, *given))
  with pytest.raises(ValueError, match="--haystack with --table=main, in which prompts end at the question"):
    eval_niah.rows_to_compute(settings(eval_niah, *ask))


@pytest.mark.slow
@pytest.mark.scripts
def test_a_model_learns_with_needles_and_is_asked(tmp_path, folder):
  config = RATPlusConfig(1500, 1, 32, 2, memory=False)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  rat_jax.save_pretrained(tmp_path / "start", config, params)
  same = [f"--tokenizer={folder}", f"--workdir={tmp_path}/run"]
  run_python("-m", "experiments.retrofit", f"--checkpoint={tmp_path}/start", f"--data={folder}/data", "--gate_bias=-1",
             "--steps=6", "--batch_size=3", "--length=500", "--needles=multikey_1,multikey_2", *same)
  _, _, notes = rat_jax.train.Checkpoints(tmp_path / "run" / "checkpoints").load_params()
  assert (notes["needles"], notes["needle_weight"]) == (["multikey_1", "multikey_2"], 4.0)
  ask = ["-m", "experiments.eval_niah", f"--haystack={folder}/data", "--table=retrofit", "--length=256", "--count=2",
         "--only=dense", "--only=Quest 16, 1/4", "--skip=random", f"--checkpoint={tmp_path}/run/checkpoints", *same]
  told = run_python(*ask)
  assert "exact match, in percent" in told
  assert told.count("| Quest 16, 1/4 ") == 2
  assert len(json.loads((tmp_path / "run" / "results.json").read_text())) == 16


def test_text_of_debian(tmp_path, monkeypatch):
  """With programs in place of Debian's own, which have a package of each kind, and one that cannot be had."""
  programs, tree = tmp_path / "bin", tmp_path / "tree"
  programs.mkdir()
  (tree / "sub").mkdir(parents=True)
  (tree / "a.rst.gz").write_bytes(gzip.compress(b"a packed text"))
  (tree / "sub" / "b.txt").write_bytes(b"a text")
  (tree / "damaged.txt.gz").write_bytes(b"\x1f\x8b")
  (tree / "page.html").write_bytes(b"<p>")
  entry = b"word\n  what it means\n\n"
  (tree / "words.dict.dz").write_bytes(gzip.compress(entry * 5000))
  for name, script in (("apt-cache", 'echo "$2"; [ "$2" = linux-doc ] && echo "  Depends: linux-doc-6.1"; true'),
                       ("apt-get", '[ "$2" = dict-gcide ] && { echo "E: no dict-gcide" >&2; exit 100; };'
                                   ' touch "$2_1.2_all.deb"'),
                       ("dpkg-deb", f'cp -r {tree} "$3"')):
    (programs / name).write_text(f"#!/bin/sh\n{script}\n")
    (programs / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
  library = tmp_path / "library"
  for place in ("one.py", "test/two.py", "site-packages/other.py", "data.txt"):
    (library / place).parent.mkdir(parents=True, exist_ok=True)
    (library / place).write_text(place)
  monkeypatch.setattr(debian_text.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
  sources, left_out = debian_text.collect(tmp_path / "text")
  assert [(one["source"].split(" of ")[0], one["files"], one["bytes"]) for one in sources] == [
      ("Debian's linux-doc-6.1 1.2", 4, 13 + 6 + len(entry) * 5000),
      ("Debian's python3-doc 1.2", 4, 13 + 6 + len(entry) * 5000), ("the standard library", 2, 17)]
  assert left_out == ["dict-gcide is left out: apt-get download dict-gcide: E: no dict-gcide"]
  texts = [path.read_bytes() for path in sorted((tmp_path / "text" / "linux-doc").iterdir())]
  assert b"".join(texts[2:]) == entry * 5000
  assert all(text.startswith(b"word\n") and text.endswith(b"\n\n") for text in texts[2:])
  monkeypatch.setenv("PATH", str(tmp_path))
  sources, left_out = debian_text.collect(tmp_path / "none")
  assert len(sources) == 1
  assert len(left_out) == 3
  assert "No such file or directory: 'apt-cache'" in left_out[0]
