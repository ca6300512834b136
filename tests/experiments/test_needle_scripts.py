"""The needle scripts: small models under the modes, what batching does not change, kept cells, reports, bad input."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

import rat_jax
from conftest import run_python
from experiments import eval_niah
from experiments.needles import questions, report, rows, seeds
from experiments.needles.questions import Questions
from needle_model import trained
from rat_jax import Dense, Quest, RATPlusConfig, RATPlusLM
from rat_jax.data import BYTES
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Rows
from rat_jax.evaluate.needles import answered

LENGTH = 128


ASKED = Questions(length=LENGTH, count=32, batch_size=96, free_running=8)
SETTINGS = eval_niah.Settings(
    workdir=pathlib.Path("none"), checkpoint=("none",), length=LENGTH, count=32, batch_size=96, match=True,
    workers=None, text=False, tokenizer=BYTES, ruler=None, essay=None, epochs=4.0, answer_room=128, only=(), skip=(),
    tasks=tuple(TASKS), table="main", prompt_end="main", free_running=8, spacing=0, near_miss=0.0, haystack=None)


def asked(**changes):
  return dataclasses.replace(ASKED, **changes)


def settings(**changes):
  return dataclasses.replace(SETTINGS, **changes)


def rows_named(*labels):
  found = [row for row in rows.main_rows(LENGTH) if row.label in labels]
  assert len(found) == len(labels)
  return found


@pytest.mark.slow
def test_a_small_trained_model_under_the_modes():
  model, params = trained()
  expected = {  # of single_2 and of multikey_1, in which copying any needle gives 25
      "dense": ((97, 100), (75, 97)), "Quest 8, 1/4": ((97, 100), (75, 97)),
      "MoBA 16 decode, 1/4": ((75, 98), (45, 80)), "MoBA 16 prompt, 1/4": ((95, 100), (55, 90)),
      "MoBA 16 everywhere, 1/4": ((75, 98), (45, 80)), "SnapKV aware, 1/4": ((80, 100), (65, 95)),
      "SnapKV blind, 1/4": ((3, 40), (3, 40)), "Quest 16, 1/4, random": ((3, 40), (3, 40)),
      "Quest 16, 1/4, oracle": ((97, 100), (70, 95)), "DilatedTopK 16, 4 blocks": ((50, 85), (35, 70)),
      "TopK, 1/4": ((97, 100), (75, 97)),
      "dilated:8 everywhere": ((97, 100), (80, 100)), "dilated:16 everywhere": ((45, 80), (35, 70)),
      "dilated:16,window=32 everywhere": ((25, 60), (20, 55)), "streaming_llm:60 everywhere": ((30, 65), (40, 75))}
  tasks = [TASKS["single_2"], TASKS["multikey_1"]]
  for row in rows_named(*expected, "Quest 16, 1/4, first"):
    cells = questions.cells(asked(count=64), model, params, row, tasks)
    for i, task in enumerate(tasks):
      if row.label == "Quest 16, 1/4, first":  # two blocks, both forced
        assert "nothing to choose" in cells[task.name]["blank"]
        assert cells[task.name]["blank"].startswith(f"at T={LENGTH}: ")
      else:
        least, most = expected[row.label][i]
        assert least <= cells[task.name]["accuracy"][0] <= most, (row.label, cells)


RANDOM = rows.Row("Quest 8, 1/2, random", lambda question: (
    Quest(64, block=8, keep_first=False, selector="random"), None))


@pytest.mark.slow
@pytest.mark.parametrize("row", [*rows_named("Quest 8, 1/4", "SnapKV aware, 1/4, random"), RANDOM],
                         ids=lambda row: row.label)
def test_cells_alone_and_together_and_free_running_are_one(row):
  model, params = trained()
  tasks = [TASKS["single_2"], TASKS["single_1"], TASKS["multikey_1"]]
  together = questions.cells(ASKED, model, params, row, tasks, free=tasks[:1])
  free = together["single_2"]["free_running"]
  assert free["agrees"] == 1.0
  right = seeds.from_hex(together["single_2"])[0, :8]
  assert free["exact_match"] == free["comma_recall"] == 100 * right.mean() <= free["string_match_all"]
  assert together["single_2"]["accuracy"][0] > 20
  for task in tasks:
    alone = questions.cells(asked(batch_size=4), model, params, row, [task])[task.name]
    assert alone["right"] == together[task.name]["right"]


@pytest.mark.slow
@pytest.mark.scripts
def test_in_bfloat16_a_cell_alone_is_within_a_point_of_one_in_a_batch():
  model, params = trained()
  model = RATPlusLM(dataclasses.replace(model.config, dtype="bfloat16"))
  (row,) = rows_named("Quest 8, 1/4")
  tasks = [TASKS["single_2"], TASKS["single_1"]]
  together = questions.cells(asked(count=256), model, params, row, tasks)
  alone = questions.cells(asked(count=256, batch_size=32), model, params, row, tasks[:1])
  assert together["single_2"]["accuracy"][0] > 90
  assert abs(alone["single_2"]["accuracy"][0] - together["single_2"]["accuracy"][0]) <= 1


@pytest.mark.slow
@pytest.mark.scripts
def test_cells_are_kept_and_a_table_half_done_is_finished(tmp_path, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "")  # the script adds to it
  model, params = trained()
  one = jax.tree.map(lambda x: x[0], params)
  state = rat_jax.init_train_state(model, one, rat_jax.make_optimizer(1e-3, total_steps=1))
  for name in ("a", "b"):
    rat_jax.train.Checkpoints(tmp_path / name / "seed-0").save(state, model.config, {"seeds": 1})
  both = f"{tmp_path}/a,{tmp_path}/b"  # one arm in two folders
  assert (jax.tree.leaves(seeds.load(both)[1])[0].shape[0], seeds.name_of(both)) == (2, "a")
  folder = tmp_path / "table"
  of_table = settings(checkpoint=(str(tmp_path / "a"),), only=("dense", "Quest 8, 1/4"),
                      tasks=("single_2", "multikey_1"), workdir=folder, free_running=0)
  eval_niah.main(of_table)
  whole, table = json.loads((folder / "results.json").read_text()), (folder / "table.md").read_text()
  assert len(whole) == 6  # two rows of two tasks, and "Quest 8, 1/4, first"
  (folder / "results.json").write_text(json.dumps(dict(list(whole.items())[:3])))
  eval_niah.main(of_table)
  assert json.loads((folder / "results.json").read_text()) == whole
  assert (folder / "table.md").read_text() == table
  (cell,) = [cell for key, cell in whole.items() if key.endswith("|dense|single_2")]
  kept = json.loads((folder / "accuracies.json").read_text())["a"]["dense"]["single_2"]
  assert kept.keys() == cell.keys() - {"right"}
  assert kept["error_over_examples"] == [pytest.approx(cell["error_over_examples"][0], abs=1e-3)]
  assert (kept["accuracy"], kept["tokens_read"]) == (cell["accuracy"], LENGTH)
  monkeypatch.setattr(questions, "free_running", lambda *_: {"agrees": 1.0} | dict.fromkeys(
      ("exact_match", "string_match_all", "comma_recall"), 50.0))
  for count in (4, 4, 5):  # a cell is known by how many sequences are decoded greedily
    eval_niah.main(dataclasses.replace(of_table, free_running=count))
  decoded = {key: cell for key, cell in json.loads((folder / "results.json").read_text()).items() if key not in whole}
  assert [key.split("|", 3)[3] for key in decoded] == [f"dense|single_2|{count} decoded" for count in (4, 5)]
  assert all(cell.pop("free_running")["agrees"] == 1.0 for cell in decoded.values())
  assert list(decoded.values()) == [cell, cell]
  with pytest.raises(ValueError, match="is the start of no row"):
    eval_niah.main(dataclasses.replace(of_table, only=("Dense",)))
  (folder / "results.json").write_text("{")
  with pytest.raises(ValueError, match=r"results\.json is not JSON"):
    eval_niah.main(of_table)
  rat_jax.train.Checkpoints(tmp_path / "b" / "seed-0").save(
      dataclasses.replace(state, step=np.int32(1)), model.config, {"seeds": 2})
  with pytest.raises(ValueError, match="holds 1 seeds of a run of 2"):
    seeds.load(str(tmp_path / "b"))


def test_rows_are_chosen_by_their_start_and_left_out_by_any_part():
  of = lambda **changes: [row.label for row in eval_niah.rows_to_compute(settings(**changes))]
  assert of(only=("dense", "Quest 8, 1/4"), skip=("first",)) == ["dense", "Quest 8, 1/4"]
  with pytest.raises(ValueError, match=r"--only=\['Dense'\] is the start of no row that --skip=\[\] leaves"):
    of(only=("Dense",))


def test_flags_that_would_change_no_cell_are_refused(tmp_path):
  shown = dict(table="main", workdir=tmp_path / "run", checkpoint=(str(tmp_path),), length=1024)
  for changes, message in (
      (dict(given=frozenset({"near_miss"}), tasks=("single_1", "multiquery"), near_miss=0.5),
       "--near_miss: keys of one symbol differ in it alone anyway"),
      (dict(given=frozenset({"free_running"}), only=("TopK, 1/4",)),
       r"--free_running: no row that is asked for is also decoded; ask for one of \['dense'"),
      (dict(given=frozenset({"free_running", "near_miss"}), only=("TopK, 1/8",)), "holds no seed")):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      eval_niah.main(settings(**shown | changes))
  assert not list(tmp_path.iterdir())


def test_a_cell_is_known_by_what_was_asked_and_of_whom():
  quest, aware, blind = rows_named("Quest 8, 1/4", "SnapKV aware, 1/4", "SnapKV blind, 1/4")
  task = TASKS["multikey_1"]
  answer = LENGTH - task.answer_length
  assert [ASKED.prompt_length(row, task) for row in (quest, aware)] == [answer - task.query_length, answer]
  assert [row.build(5)[0].obs_window for row in (aware, blind)] == [5, 8]
  every = [{}, {"spacing": 16}, {"near_miss": 0.5}, {"prompt_end": "answer"}, {"seed": 1}]
  known, seen = set(), set()
  for one in every:
    assert settings(**one).asked == asked(**one)
    known.add(asked(**one).options(quest))
    tokens = np.asarray(asked(**one).sequences("multikey_1")["tokens"])
    seen.add((asked(**one).prompt_length(quest, task), tokens.tobytes()))
    assert asked(**one).prompt_length(aware, task) == answer
  assert known == {"main, spacing 0, near misses 0.0", "main, spacing 16, near misses 0.0",
                   "main, spacing 0, near misses 0.5", "answer, spacing 0, near misses 0.0",
                   "main, spacing 0, near misses 0.0, seed 1"}
  assert len(seen) == len(every) - 1  # keys of one symbol differ in it alone anyway
  _, params = trained()
  other = params | {"embedding": params["embedding"].at[0, 0, 0].add(1e-3)}
  assert seeds.fingerprint(params) == seeds.fingerprint(jax.tree.map(np.array, params)) != seeds.fingerprint(other)
  for twice in (["a", "a"], ["a,b", "b"], ["a,a"], ["x/a", "y/a"]):
    with pytest.raises(ValueError, match=r"given twice|have one name"):
      seeds.check_names(twice)


def test_room_is_asked_for_before_anything_is_made():
  asked(count=3).check_room(["single_1", "multiquery"])
  assert np.asarray(asked(count=3).sequences("single_1")["tokens"]).shape == (3, LENGTH)
  for changes in ({"length": 32}, {"spacing": 1000}):
    with pytest.raises(ValueError, match=r"--length=\d+ --spacing=\d+: multiquery has no room"):
      asked(count=3, **changes).check_room(["multiquery"])


def test_the_papers_moba_is_in_the_prompt_alone():
  by_label = {row.label: row for row in rows.paper_rows(4096)}
  mode, prefill_mode = by_label["MoBA 64 prompt, 1/8, first"].build(3)
  assert (mode, str(prefill_mode)) == (Dense(), "moba:8")
  assert by_label["MoBA 64 prompt, 1/8, first"].at_answer
  assert str(by_label["Quest 64, 1/8, first"].build(3)[0]) == "quest:512"


def test_a_task_alone_has_the_sequences_of_a_batch_of_all():
  start = (Rows(TASKS["single_1"], 32), Rows(TASKS["single_2"], 32))
  every = jax.jit(lambda: mini_niah.batch(start, LENGTH, seeds.DATA_SEED, 0))()
  for name, one in ASKED.sequences("single_2").items():
    np.testing.assert_array_equal(one, every[name][32:])
  assert asked(length=32).sequences("single_1")["tokens"].shape == (32, 32)
  with pytest.raises(ValueError, match="length=32 leaves 10 tokens of context to multiquery"):
    asked(length=32).sequences("multiquery")


@pytest.mark.slow
@pytest.mark.scripts
def test_rows_in_processes_of_their_own_are_the_same(tmp_path):
  """Two processes make the table that one makes; they are sent its settings."""
  model, params = trained()
  one = jax.tree.map(lambda x: x[0], params)
  state = rat_jax.init_train_state(model, one, rat_jax.make_optimizer(1e-3, total_steps=1))
  rat_jax.train.Checkpoints(tmp_path / "a" / "seed-0").save(state, model.config, {})
  of_table = settings(checkpoint=(str(tmp_path / "a"),), only=("Quest 8, 1/4",), tasks=("single_2",), free_running=0)
  for workers in (1, 2):
    eval_niah.main(dataclasses.replace(of_table, workdir=tmp_path / str(workers), workers=workers))
  alone, together = (json.loads((tmp_path / workers / "results.json").read_text()) for workers in "12")
  assert alone.keys() == together.keys()
  for key, cell in alone.items():  # up to ties: only this process leaves out XLA's optimizations
    assert np.mean(seeds.from_hex(cell) == seeds.from_hex(together[key])) > 0.9


@pytest.mark.slow
@pytest.mark.mesh
def test_the_same_data_on_one_and_on_four_devices():
  digests = {run_python("tests/experiments/programs/data_digest.py", str(n), devices=n) for n in (1, 4)}
  assert len(digests) == 1


def test_answers_of_a_whole_batch_agree_with_the_logits():
  model, params = trained()
  made = jax.jit(lambda: mini_niah.batch((Rows(TASKS["single_2"], 16),), LENGTH, 5, 0))()
  one = jax.tree.map(lambda x: x[0], params)
  logits = np.asarray(model.apply({"params": one}, made["tokens"]))
  right = np.asarray(answered(model, one, made))
  for row in range(16):
    at = np.flatnonzero(np.asarray(made["answers"])[row])
    assert right[row] == (logits[row, at].argmax(-1) == np.asarray(made["tokens"])[row, at + 1]).all()


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"holds no seed-\* checkpoints; give the folder around seed-\*"):
    seeds.load(str(tmp_path))
  for folder, error, message in (("none", FileNotFoundError, "none does not exist; give the folder around seed-"),
                                 (f"{tmp_path},gs://b/run", FileNotFoundError, "holds no seed"),
                                 ("gs://b/run", ValueError, "folder='gs://b/run' is a URL")):
    with pytest.raises(error, match=message):
      seeds.load(folder)
  model = RATPlusLM(RATPlusConfig(61, 1, 16, 2))
  optimizer = rat_jax.make_optimizer(1e-3, total_steps=1)
  state = rat_jax.init_train_state(model, model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"],
                                   optimizer)
  rat_jax.train.Checkpoints(tmp_path / "seed-0").save(state, model.config, {})
  with pytest.raises(ValueError, match="vocab_size=61"):
    seeds.load(str(tmp_path))


def test_tasks_are_mini_niahs_and_in_words_rulers_too(tmp_path):
  of_table = settings(tasks=("vt", "qa_1"), table="paper", workdir=tmp_path)
  for changes, error, message in (
      ({}, ValueError, r"--tasks=\['qa_1', 'vt'\] are unknown; use some of \['single_1'"),
      (dict(text=True), ValueError, "vt, cwe, fwe, qa_1, qa_2 need RULER's files, as --ruler"),
      (dict(text=True, ruler=str(tmp_path)), FileNotFoundError, "vt.jsonl")):
    with pytest.raises(error, match=message):
      eval_niah.main(dataclasses.replace(of_table, **changes))


def cell_of(*of_seeds):
  right = np.array(of_seeds)
  return {"accuracy": (100 * right.mean(axis=1)).tolist(), "count": right.shape[1],
          "right": seeds.to_hex(right)}


def parts_of(table):
  return [[part.strip() for part in line.split("|")[1:-1]] for line in table.splitlines()]


def test_differences_are_paired_and_blanks_say_why():
  a, b = [1, 1, 1, 0, 1, 1, 1, 1, 0, 1], [1, 1, 0, 0, 1, 1, 1, 1, 0, 1]
  c = [0, 1, 0, 0, 1, 1, 0, 1, 0, 1]
  blank = {"t": {"blank": "no room"}}
  full = {"x/one": {"dense": {"t": cell_of(a, b)}, "Quest, 1/4": blank},
          "x/two": {"dense": {"t": cell_of(c, c)}, "Quest, 1/4": blank}}
  difference = (np.array(a) + b) / 2 - c
  error = 100 * difference.std(ddof=1) / 10**0.5
  assert parts_of(report.differences(full))[2:] == [
      ["dense", "one", f"{100 * difference.mean():+.1f}", f"{error:.1f}", "5.0", f"{100 * difference.mean():+.1f}+"]]
  overlapping = {"x/one": {"dense": {"t": cell_of(a, [1, 1, 1, 1] + 6 * [0])}},
                 "x/two": {"dense": {"t": cell_of(c, c)}}}
  assert parts_of(report.differences(overlapping))[2][-1] == "+10.0"  # no +: a seed of 40 is below the other's 50
  assert report.blanks(full) == "Quest, 1/4: no room"
  table = parts_of(report.table(full))
  error = 100 * ((np.array(a) + b) / 2).std() / 10**0.5
  assert table[2] == ["dense", "one", "75.0", f"5.0, {error:.1f}", "75.0", "80 70"]
  assert table[-1][2:] == ["", "", "", ""]
  assert parts_of(report.errors_by_task(full))[2:] == [
      ["dense", "one", f"5.0, {error:.1f}"], ["dense", "two", "0.0, 15.8"],
      ["Quest, 1/4", "one", ""], ["Quest, 1/4", "two", ""]]
  dense = {"accuracy": [80, 70], "count": 10, "error_over_seeds": 5}
  assert report.compact(full)["one"] == {"dense": {"t": dense}, "Quest, 1/4": blank}
  assert parts_of(report.side_by_side(full))[2:] == [
      ["dense", "50.0 / 75.0", "50.0 (50 50) / 75.0 (80 70)"], ["Quest, 1/4", "", ""]]
  assert parts_of(report.means(full))[::2] == [["mode", "one", "two"], ["dense", "75.0 (80 70)", "50.0 (50 50)"]]
  assert report.unmatched(full).splitlines()[1] == (
      "one, seed 1, kept, for want of others: dense accuracy below 95 in t 70.0")
  partly = {"x/one": {"dense": {"t": cell_of(a, b), "u": {"blank": "no room"}}}}
  assert parts_of(report.table(partly))[2][2:] == ["", "", "75.0", "", ""]
  assert report.blanks(partly) == "dense (u): no room"
  assert report.by_budget(full) == {}


def test_a_seed_that_is_not_matched_is_named_and_left_out():
  good, bad, sparse = [1] * 10, [0] + [1] * 9, [1, 0] * 5
  cells = {"x/one": {"dense": {"t": cell_of(good, bad, good)}, "Quest, 1/4": {"t": cell_of(sparse, good, good)}},
           "x/two": {"dense": {"t": cell_of(bad)}, "Quest, 1/4": {"t": {"blank": "no room"}}}}
  left = report.matched(cells)
  assert left["x/one"]["Quest, 1/4"]["t"]["accuracy"] == [50.0, 100.0]
  np.testing.assert_array_equal(seeds.from_hex(left["x/one"]["Quest, 1/4"]["t"]), [sparse, good])
  assert left["x/two"] == cells["x/two"]
  assert report.unmatched(cells).splitlines() == [
      "one, seed 1, left out: dense accuracy below 95 in t 90.0",
      "two, seed 0, kept, for want of others: dense accuracy below 95 in t 90.0"]
  assert " 50 100 " in report.report(cells)
