"""The needle scripts with tasks in words: fine-tuning, what is asked of whom, and how it is scored."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

import rat_jax
from conftest import run_python
from experiments import eval_niah, niah, niah_table, text_needles
from needle_model import trained
from rat_jax import Dense, RATPlusConfig, RATPlusLM


@pytest.mark.slow
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


def test_a_model_is_not_asked_what_it_was_fine_tuned_on(parsed_flags, tmp_path, monkeypatch):
  for folder, answer in (("seen", 1), ("copy", 1), ("new", 2)):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "single_1.jsonl").write_text(json.dumps({"input": "What is it?", "outputs": [answer]}))
  kept = {}  # the notes of a model that is not in fact trained
  monkeypatch.setattr(text_needles, "train", lambda *_, notes, **__: kept.update(notes))
  monkeypatch.setattr(text_needles, "load_model", lambda _: (*trained(), dict(kept)))
  tune = lambda: text_needles.fine_tune("start", ["single_1"], 1, 512, 1, [Dense()], 1e-5)
  with flagsaver.flagsaver(workdir=str(tmp_path / "tuned"), length=512, count=1, tasks=["single_1"]):
    with flagsaver.flagsaver(ruler=str(tmp_path / "seen")):
      tune()
    tune()  # then on tasks of our own, which does not undo it
    for folder in ("seen", "copy"):
      with flagsaver.flagsaver(ruler=str(tmp_path / folder)), \
          pytest.raises(ValueError, match=rf"{folder}: --checkpoint=tuned was fine-tuned on \['.*single_1.jsonl'\]"):
        eval_niah.text_cells("tuned")
    with flagsaver.flagsaver(ruler=str(tmp_path / "new")):
      eval_niah.text_cells("tuned")
    eval_niah.text_cells("tuned")
    with flagsaver.flagsaver(seed=niah.DATA_SEED), pytest.raises(ValueError, match="with it would be trained on what"):
      tune()


def test_examples_of_words_are_known_by_what_is_in_them(parsed_flags, tmp_path):
  file, essay = tmp_path / "niah_single_1" / "validation.jsonl", tmp_path / "essay.txt"
  file.parent.mkdir()
  known = set()
  for answer in (1, 2):
    file.write_text(json.dumps({"input": "Long ago.\nWhat is it?", "outputs": [answer], "answer_prefix": " It is"}))
    essay.write_text(f"It was {answer}.")
    with flagsaver.flagsaver(ruler=str(tmp_path)):  # as RULER's own scripts leave it
      (example,) = text_needles.load(["single_1"], 1, 512, 0)["single_1"]
      assert example.answers == (str(answer),)
      known.add(text_needles.origin("single_1"))
    for room in (64, 128):
      with flagsaver.flagsaver(essay=str(essay), answer_room=room):
        known.add(text_needles.origin("single_1"))
  assert len(known) == 6
  windows = []
  row = niah_table.Row("", lambda question: windows.append(question) or (Dense(), None))
  model = RATPlusLM(RATPlusConfig(256, 1, 16, 2))
  params = model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  with flagsaver.flagsaver(answer_room=2):
    text_needles.cells(model, params, row, {"single_1": [example]}, 64, 1)
  assert windows == [len(b"What is it? It is")]
  for one, told in (({"answer_room": 512}, "answer_room=512 leaves nothing"),
                    ({"essay": str(tmp_path)}, "essay=.*give a file of UTF-8 text"),
                    ({"essay": "/dev/null"}, "the essay of 0 sentences")):
    with flagsaver.flagsaver(**one), pytest.raises(ValueError, match=told):
      text_needles.load(["single_2"], 1, 512, 0)


def test_text_is_fine_tuned_on_its_answers_and_scored_by_what_is_said(parsed_flags, monkeypatch):
  names, length = ["single_1", "multiquery"], 1024
  examples = text_needles.load(names, 3, length, 0)
  flat = [one for of_task in examples.values() for one in of_task]
  batch = jax.tree.map(np.asarray, text_needles.answer_batch(flat, length))
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
  rows = {row.label: row for row in niah_table.paper_rows(length)}
  cells = text_needles.cells(None, None, rows["Quest 64, 1/4"], examples, length, batch_size=2)
  assert said == [one.prompt for one in flat]
  assert [cells[name]["accuracy"][0] for name in names] == pytest.approx([200 / 3, 100])
  assert cells["single_1"]["by_example"] == [0, 100, 100]
  assert [cells["multiquery"][score] for score in ("comma_recall", "exact_match")] == [100, 100]
  cells = text_needles.cells(None, None, rows["Quest 64, 1/16, first"], examples, length, batch_size=2)
  assert "use at least 65" in cells["single_1"]["blank"]
  assert cells["single_1"]["blank"].startswith(f"at T={length}: ")
  with pytest.raises(ValueError, match=r"single_1, example 1: a prompt of \d+ tokens"), \
      flagsaver.flagsaver(answer_room=8):
    text_needles.load(names[:1], 1, length, 0)
