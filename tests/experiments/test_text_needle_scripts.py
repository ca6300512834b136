"""The needle scripts with tasks in words: fine-tuning, what is asked of whom, and how it is scored."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import pickle

import jax
import numpy as np
import pytest
import tokenizers

import rat_jax
from conftest import run_python
from experiments import eval_niah
from experiments.needles import report, rows, seeds, words
from needle_model import trained
from rat_jax import Dense, RATPlusConfig, RATPlusLM, SnapKV
from rat_jax.data import BYTES, load_tokenizer
from rat_jax.evaluate import Example

SETTINGS = words.Settings(workdir=pathlib.Path("none"), text=True, tokenizer=BYTES, ruler=None, essay=None, epochs=4.0,
                          answer_room=128)


def settings(**changes):
  return dataclasses.replace(SETTINGS, **changes)


@pytest.mark.slow
@pytest.mark.scripts
def test_a_model_of_bytes_is_fine_tuned_and_asked(tmp_path):
  model = RATPlusLM(RATPlusConfig(256, 1, 32, 2))
  state = rat_jax.init_train_state(model, model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"],
                                   rat_jax.make_optimizer(1e-3, total_steps=1))
  rat_jax.train.Checkpoints(tmp_path / "start").save(state, model.config, {})
  task = ["--text", "--tasks=single_1,multikey_2"]
  tune = ["-m", "experiments.sft_niah", *task, f"--init={tmp_path}/start", "--stages=640x8", "--examples=4",
          "--epochs=40", "--learning_rate=1e-2", f"--workdir={tmp_path}/tuned"]
  assert "no RULER score" in run_python(*tune)
  lines = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
  assert len(lines) == 40
  assert lines[-1]["loss"][0] < 0.6 * lines[0]["loss"][0]
  assert "of a run with examples=8, this one has 6" in run_python(*tune, "--examples=3", check=False)
  ask = ["-m", "experiments.eval_niah", *task, "--table=paper", "--only=dense", "--only=SnapKV", "--length=640",
         "--count=2", f"--workdir={tmp_path}/asked", f"--checkpoint={tmp_path}/tuned", f"--checkpoint={tmp_path}/start"]
  told = run_python(*ask)
  assert "string_match_all, our own tasks" in told
  assert "capacity=40; use at least 65" in told
  assert "comma_recall" in told
  before = (tmp_path / "asked" / "results.json").read_text()
  assert run_python(*ask).endswith(told[told.index("string_match_all"):])  # from the kept cells
  assert (tmp_path / "asked" / "results.json").read_text() == before


def one_model():
  """(model, parameters) of the first seed of a model of needles."""
  model, params = trained()
  return model, jax.tree.map(lambda x: x[0], params)


def test_a_model_is_not_asked_what_it_was_fine_tuned_on(tmp_path, monkeypatch):
  for folder, answer in (("seen", 1), ("copy", 1), ("new", 2)):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "single_1.jsonl").write_text(json.dumps({"input": "What is it?", "outputs": [answer]}))
  kept = {}  # the notes of a model that is not in fact trained
  monkeypatch.setattr(words, "train", lambda *_, notes, **__: kept.update(notes))
  monkeypatch.setattr(words, "load_model", lambda *_: (*one_model(), dict(kept)))
  tune = lambda **changes: words.fine_tune(settings(workdir=tmp_path / "tuned", **changes), "start", ["single_1"], 1,
                                           512, 1, [Dense()], 1e-5)
  ask = lambda ruler: eval_niah.text_cells(eval_niah.Settings(
      **vars(settings(ruler=ruler)), checkpoint=("tuned",), length=512, count=1, batch_size=1, match=True, workers=1,
      only=(), skip=(), tasks=("single_1",), table="paper", prompt_end="main", free_running=32, spacing=0,
      near_miss=0.0, haystack=None), "tuned")
  tune(ruler=str(tmp_path / "seen"))
  tune()  # then on tasks of our own, which does not undo it
  for folder in ("seen", "copy"):
    with pytest.raises(ValueError, match=rf"{folder}: --checkpoint=tuned was fine-tuned on \['.*single_1.jsonl'\]"):
      ask(str(tmp_path / folder))
  ask(str(tmp_path / "new"))
  ask(None)
  with pytest.raises(ValueError, match="with it would be trained on what"):
    tune(seed=seeds.DATA_SEED)
  with pytest.raises(ValueError, match="--mode=snapkv:80: SnapKV compresses when the prompt ends, and what is trained"):
    words.fine_tune(SETTINGS, "start", ["single_1"], 1, 512, 1, [SnapKV(80)], 1e-5)


def test_examples_of_words_are_known_by_what_is_in_them(tmp_path):
  file, essay = tmp_path / "niah_single_1" / "validation.jsonl", tmp_path / "essay.txt"
  file.parent.mkdir()
  known = set()
  for answer in (1, 2):
    file.write_text(json.dumps({"input": "Long ago.\nWhat is it?", "outputs": [answer], "answer_prefix": " It is"}))
    essay.write_text(f"It was {answer}.")
    of_ruler = settings(ruler=str(tmp_path))  # as RULER's own scripts leave it
    (example,) = words.load(of_ruler, ["single_1"], 1, 512, 0)["single_1"]
    assert example.answers == (str(answer),)
    known.add(words.origin(of_ruler, "single_1"))
    for room in (64, 128):
      known.add(words.origin(settings(essay=str(essay), answer_room=room), "single_1"))
  assert len(known) == 6
  windows = []
  row = rows.Row("", lambda question: windows.append(question) or (Dense(), None))
  model = RATPlusLM(RATPlusConfig(256, 1, 16, 2))
  params = model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  words.cells(settings(answer_room=2), model, params, row, {"single_1": [example]}, 64, 1)
  assert windows == [len(b"What is it? It is")]
  for one, told in (({"answer_room": 512}, "answer_room=512 leaves nothing"),
                    ({"essay": str(tmp_path)}, "essay=.*give a file of UTF-8 text"),
                    ({"essay": "/dev/null"}, "the essay of 0 sentences")):
    with pytest.raises(ValueError, match=told):
      words.load(settings(**one), ["single_2"], 1, 512, 0)


def test_text_is_fine_tuned_on_its_answers_and_scored_by_what_is_said(monkeypatch):
  names, length = ["single_1", "multiquery"], 1024
  examples = words.load(SETTINGS, names, 3, length, 0)
  flat = [one for of_task in examples.values() for one in of_task]
  batch = jax.tree.map(np.asarray, words.answer_batch(BYTES, flat, length))
  for tokens, targets, example in zip(batch["tokens"], batch["targets"], flat, strict=True):
    at = np.flatnonzero(targets != -100)
    assert bytes(tokens[:at[0] + 1].tolist()).decode() == example.prompt
    assert bytes(targets[at].tolist()).decode() == " " + ",".join(example.answers) + "\0"
    assert (tokens[at[:-1] + 1] == targets[at[:-1]]).all()

  said = []  # the answers, but for the first one's last digit

  def generate(model, params, tokens, lengths, *, max_new_tokens, **_):
    out = np.zeros((len(tokens), max_new_tokens), np.int32)
    for row in range(len(tokens)):
      answer = list((" " + ",".join(flat[len(said)].answers)).encode())
      out[row, :len(answer)] = answer if said else [*answer[:-1], ord("x")]
      said.append(bytes(tokens[row, :lengths[row]].astype(np.uint8).tolist()).decode())
    return out

  monkeypatch.setattr(rat_jax, "generate", generate)
  by_label = {row.label: row for row in rows.paper_rows(length)}
  cells = words.cells(SETTINGS, None, None, by_label["Quest 64, 1/4"], examples, length, batch_size=2)
  assert said == [one.prompt for one in flat]
  assert [cells[name]["accuracy"][0] for name in names] == pytest.approx([200 / 3, 100])
  assert cells["single_1"]["by_example"] == [0, 100, 100]
  assert [cells["multiquery"][score] for score in ("comma_recall", "exact_match")] == [100, 100]
  assert cells["single_1"]["comma_recall_by_example"] == [0, 100, 100]
  cells = words.cells(SETTINGS, None, None, by_label["Quest 64, 1/16, first"], examples, length, batch_size=2)
  assert "use at least 65" in cells["single_1"]["blank"]
  assert cells["single_1"]["blank"].startswith(f"at T={length}: ")
  with pytest.raises(ValueError, match=r"single_1, example 1: a prompt of \d+ tokens"):
    words.load(settings(answer_room=8), names[:1], 1, length, 0)


def test_the_error_of_comma_recall_is_its_own():
  cell = {"accuracy": [50.0], "count": 4, "by_example": [0, 100, 0, 100], "error_over_examples": [25.0],
          "comma_recall": 25.0, "comma_recall_by_example": [0, 100, 0, 0], "exact_match": 25.0}
  def line(cell):
    told = report.report({"x/one": {"dense": {"t": cell}}}).split("comma_recall\n\n")[1]
    return [part.strip() for part in told.splitlines()[2].split("|")[1:-1]]

  assert line(cell) == ["dense", "one", "25.0", "21.7", "25.0", "25"]
  older = {name: value for name, value in cell.items() if name != "comma_recall_by_example"}
  assert line(older) == ["dense", "one", "25.0", "nan", "25.0", "25"]
  assert report.compact({"x/one": {"dense": {"t": cell}}})["one"]["dense"]["t"].keys() == (
      older.keys() - {"by_example"})


def write_ruler(folder, name, *examples):
  """RULER's file of a task: (prompt, answers) for each example."""
  (folder / name).mkdir()
  (folder / name / "validation.jsonl").write_text("".join(
      json.dumps({"input": prompt, "outputs": answers}) + "\n" for prompt, answers in examples), "utf-8")


def test_an_answer_has_the_tokens_that_it_has_after_its_prompt(tmp_path, monkeypatch):
  """The end of a prompt and the start of an answer are one token here: a target, and not asked but said."""
  merges = [("i", "s"), ("is", " "), ("is ", "1")]
  vocab = dict.fromkeys(["</s>", *"What is1234?I", "is", "is ", "is 1"])
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={piece: i for i, piece in enumerate(vocab)}, merges=merges))
  made.decoder = tokenizers.decoders.Fuse()
  made.save(str(tmp_path / "tokenizer.json"))
  one, example = load_tokenizer(tmp_path / "tokenizer.json"), Example("What is it? It is", ("123",), None)
  ids = lambda *pieces: [made.token_to_id(piece) for piece in pieces]
  said = []

  def generate(model, params, tokens, lengths, *, max_new_tokens, **_):
    said.append(tokens[0, :lengths[0]].tolist())
    return np.array([[*ids("is 1", "2", "3"), one.eod_id, *ids("4")]])

  monkeypatch.setattr(rat_jax, "generate", generate)
  prompt = one.encode("What is it? It ")
  batch = jax.tree.map(np.asarray, words.answer_batch(one, [example], 32))
  assert batch["tokens"][0].tolist()[:len(prompt) + 3] == prompt + ids("is 1", "2", "3")
  assert batch["targets"][0].tolist() == [-100] * (len(prompt) - 1) + ids("is 1", "2", "3", "</s>") + [-100] * (
      32 - len(prompt) - 3)
  row = rows.Row("", lambda question: (Dense(), None))
  of_tokens = settings(tokenizer=one, answer_room=8)
  cell = words.cells(of_tokens, None, None, row, {"single_1": [example]}, 32, 1)["single_1"]
  assert said == [prompt]
  assert (cell["accuracy"], cell["exact_match"]) == ([100], 100)
  sent = pickle.loads(pickle.dumps(of_tokens))  # as to the processes of `side_by_side`
  assert sent.tokenizer.encode("What is") == one.encode("What is")
  assert dataclasses.replace(sent, tokenizer=one) == of_tokens


def test_rulers_other_tasks_are_read_and_scored_as_it_does(tmp_path, monkeypatch):
  answers = {"vt": ["AB", "CD"], "cwe": ["one", "two"], "fwe": ["x", "y"], "qa_1": ["France", "in France"],
             "qa_2": ["yes", "no"], "single_1": ["1", "2"]}
  for name, of_task in answers.items():
    write_ruler(tmp_path, name, ("Long ago. Answer: ", of_task))
  asked = []

  def generate(model, params, tokens, lengths, *, max_new_tokens, **_):
    asked.append((bytes(tokens[0, :lengths[0]].tolist()), max_new_tokens))
    return np.array([[*(answers[list(answers)[len(asked) - 1]][0] + "\0").encode()]])

  monkeypatch.setattr(rat_jax, "generate", generate)
  row = rows.Row("", lambda question: (Dense(), None))
  of_ruler = settings(ruler=str(tmp_path))
  examples = words.load(of_ruler, list(answers), 1, 512, 0)
  cells = words.cells(of_ruler, None, None, row, examples, 512, 1)
  assert {name: cell["accuracy"] for name, cell in cells.items()} == {
      "vt": [50], "cwe": [50], "fwe": [50], "qa_1": [100], "qa_2": [100], "single_1": [50]}
  assert asked == [(b"Long ago. Answer: ", most) for most in (30, 120, 50, 32, 32, 128)]
  for names, told in ((["qa_3"], r"--tasks=\['qa_3'\] are unknown; use some of .*'single_1'.*'qa_2'\]\."),
                      ([], r"--tasks=\[\] are unknown")):
    with pytest.raises(ValueError, match=told):
      words.load(of_ruler, names, 1, 512, 0)
  write_ruler(tmp_path, "multiquery", ("", ["1"]))
  with pytest.raises(ValueError, match=r"multiquery.*example 1: input='' leaves no token before the answer"):
    words.load(of_ruler, ["multiquery"], 1, 512, 0)
  with pytest.raises(ValueError, match=r"'vt'\] are unknown; .*; vt, cwe, fwe, qa_1, qa_2 need RULER's files"):
    words.load(SETTINGS, list(answers), 1, 512, 0)
  write_ruler(tmp_path, "multikey_1", ("Long ago. Answer:", ["1"]), ("Long\0ago. Answer:", ["1"]))
  for name, told in (("multikey_1", rf"{tmp_path}/multikey_1/validation\.jsonl, example 2: the text holds NUL"),
                     ("multivalue", rf"--ruler={tmp_path} holds none of niah_multivalue/validation\.jsonl, .*"
                      r"multivalue\.jsonl; give the folder around RULER's files\.")):
    with pytest.raises((ValueError, FileNotFoundError), match=told):
      words.load(of_ruler, [name], 2, 512, 0)
  with pytest.raises(ValueError, match=f"--essay: --ruler={tmp_path} has texts of its own; leave one of them out"):
    words.load(settings(ruler=str(tmp_path), essay="x", given=frozenset({"essay"})), ["vt"], 1, 512, 0)


def test_the_first_of_several_right_answers_is_taught(tmp_path, monkeypatch):
  write_ruler(tmp_path, "qa_1", ("Where? Answer:", ["France", "in France"]))
  write_ruler(tmp_path, "vt", ("Which? They are:", ["AB", "CD"]))
  batches = []
  monkeypatch.setattr(words, "train", lambda model, optimizer, state, batch_at, **_: batches.append(batch_at(0)))
  monkeypatch.setattr(words, "load_model", lambda *_: (*one_model(), {}))
  words.fine_tune(settings(workdir=tmp_path / "tuned", ruler=str(tmp_path)), "start", ["qa_1", "vt"], 1, 512, 2,
                  [Dense()], 1e-5)
  taught = {bytes(row[row >= 0].astype(np.uint8).tolist()) for row in np.asarray(batches[0]["targets"])}
  assert taught == {b" France\0", b" AB,CD\0"}
