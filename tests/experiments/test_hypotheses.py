"""The measures of experiments.hypotheses against other ways to the same numbers, on the small trained model."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rat_jax
from conftest import run_python
from experiments import hypotheses
from experiments.needles import questions, rows, seeds
from needle_model import trained
from rat_jax import Dense, Dilated, MoBA, Quest, RATPlusConfig, RATPlusLM, SnapKV
from rat_jax.evaluate import mini_niah
from rat_jax.evaluate.mini_niah import TASKS, Rows
from tests.experiments import command_line

LENGTH, COUNT = 160, 16
SETTINGS = hypotheses.Settings(workdir=pathlib.Path("none"), checkpoint=("none",), length=LENGTH, count=COUNT,
                               batch_size=128, match=True, workers=2, draws=2, parts=tuple(hypotheses.PARTS))
ASKED = SETTINGS.asked


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(hypotheses, "TASKS", {name: TASKS[name] for name in ("single_2", "multikey_1", "multiquery")})
  monkeypatch.setattr(hypotheses.report, "HARD", ())  # multikey_1 is asked anyway


def table_row(label):
  (row,) = [row for row in rows.main_rows(LENGTH) if row.label == label]
  return row


def of_all(part, model, params):
  """The pieces of a part together."""
  f, pieces = hypotheses.PARTS[part]
  return {key: one for piece in pieces for key, one in f(SETTINGS, model, params, piece).items()}


@pytest.mark.slow
def test_a_hit_is_a_whole_answer_among_what_was_chosen():
  model, params = trained()
  one, task = jax.tree.map(lambda x: x[0], params), TASKS["single_2"]
  made = ASKED.sequences("single_2")
  hits = lambda mode: hypotheses.hits(model, one, made, task, mode, isinstance(mode, SnapKV))
  assert hits(Quest(LENGTH, block=16)).all()
  assert hits(SnapKV(LENGTH, obs_window=3)).all()
  random = hits(Quest(64, block=8, keep_first=False, selector="random")).mean()
  assert 0.1 < random < 0.4  # two steps, each with 7 of 19 blocks beside its own: a share of 0.14, and a bit for luck
  golden = np.asarray(made["golden"])
  mode = Quest(40, block=8, keep_first=False)
  chosen = rat_jax.inspect(model, one, made["tokens"], mode, prompt_lengths=np.full(COUNT, LENGTH - 6))
  expected = np.ones((COUNT, 4, 4), bool)
  for row, layer, head in np.ndindex(expected.shape):
    for t in np.flatnonzero(golden[row] >= 0):
      expected[row, layer, head] &= golden[row, t] // 8 in np.asarray(chosen[layer].blocks)[row, t, head].tolist()
  np.testing.assert_array_equal(hits(mode), expected)


@pytest.mark.slow
@pytest.mark.scripts
def test_random_choice_and_the_plain_rows_are_those_of_the_table():
  model, params = trained()
  tasks = [TASKS["single_2"], TASKS["multiquery"]]
  found = of_all("random", model, params)
  cells = questions.cells(ASKED, model, params, table_row("Quest 16, 1/4, random"), tasks)
  for name, cell in cells.items():
    assert found["Quest 16"][name][0] == cell["accuracy"]
  assert len(found["SnapKV aware"]["single_2"]) == 2
  first, second = ([cells[name][draw] for cells in found.values() for name in hypotheses.TASKS] for draw in range(2))
  assert first != second


@pytest.mark.slow
@pytest.mark.scripts
def test_a_layer_alone_is_the_mode_with_the_others_dense():
  model, params = trained()
  settings = dataclasses.replace(SETTINGS, length=320)
  for case, blocks in (("MoBA 16 decode", 2), ("MoBA 16 prompt, 1/16", 1)):
    (found,) = hypotheses.layers(settings, model, params, case).values()
    for layer in (0, 3):
      mode = MoBA(blocks, block=16, keep_first=False, dense_layers=tuple(i for i in range(4) if i != layer))
      row = rows.Row("", lambda question, mode=mode: (mode, Dense()))
      if "prompt" in case:
        row = rows.Row("", lambda question, mode=mode: (Dense(), mode), at_answer=True)
      cells = questions.cells(settings.asked, model, params, row, list(hypotheses.TASKS.values()))
      assert found[f"layer {layer}"] == {name: cell["accuracy"] for name, cell in cells.items()}
    assert found["layer 0"] != found["layer 3"]


@pytest.mark.slow
@pytest.mark.scripts
def test_the_two_by_two_holds_the_model_as_it_is():
  model, params = trained()
  found = of_all("two_by_two", model, params)
  mode = Quest(LENGTH // 8, block=16, keep_first=False)
  for label, key in (("dense", "dense, select from memory, attend to memory"),
                     ("Quest 16, 1/8", f"{mode}, select from memory, attend to memory")):
    cells = questions.cells(ASKED, model, params, table_row(label), list(hypotheses.TASKS.values()))
    assert found[key] == {name: cell["accuracy"] for name, cell in cells.items()}
  plain = found["dense, select from memory, attend to plain"]["single_2"]
  assert plain[0] < found["dense, select from memory, attend to memory"]["single_2"][0]


@pytest.mark.slow
@pytest.mark.scripts
def test_a_later_question_is_asked_of_a_cache_made_for_an_earlier_one():
  model, params = trained()
  found = of_all("future", model, params)
  assert list(found) == ["dense", "1/4", "1/8", "1/16"]
  one, task = jax.tree.map(lambda x: x[0], params), TASKS["multikey_1"]
  made = jax.jit(lambda: mini_niah.batch((Rows(task, COUNT, 2, (4, 4)),), LENGTH, seeds.DATA_SEED, 1))()
  tokens, size = made["tokens"], task.query_length + task.answer_length

  def after(compressed_under, asked):  # with a cache: the prompt ends at ANS of question 0 or 1
    prompt = LENGTH - (2 - compressed_under) * size + task.query_length
    first, cache = rat_jax.prefill(model, one, tokens[:, :prompt], max_length=LENGTH,
                                   mode=SnapKV(LENGTH // 4, obs_window=task.query_length))
    rest, _ = rat_jax.extend(model, one, tokens[:, prompt:], cache)
    said = np.concatenate([np.asarray(first)[:, None], rest], axis=1).argmax(axis=-1)  # from token `prompt` on
    start = LENGTH - (2 - asked) * size + task.query_length
    answer = slice(start, start + task.answer_length)
    return 100 * np.mean((said[:, start - prompt:][:, :task.answer_length] == tokens[:, answer]).all(axis=1))

  assert {name: seeds[0] for name, seeds in found["1/4"]["multikey_1"].items()} == {
      "A": after(0, 0), "B": after(0, 1), "B under B": after(1, 1)}
  said, right = np.asarray(model.apply({"params": one}, tokens)).argmax(axis=-1), {}
  for question, end in (("A", LENGTH - size), ("B", LENGTH)):
    answer = slice(end - task.answer_length, end)
    right[question] = 100 * np.mean((said[:, answer.start - 1:end - 1] == tokens[:, answer]).all(axis=1))
  assert {name: seeds[0] for name, seeds in found["dense"]["multikey_1"].items()} == right


@pytest.mark.slow
def test_the_age_of_the_memory_is_that_of_its_weights():
  model, params = trained()
  tokens = jnp.concatenate([ASKED.sequences(name)["tokens"][:8] for name in hypotheses.TASKS])
  p = jax.tree.map(lambda x: np.asarray(x[0, 0], np.float64), params["layers"])
  x = np.asarray(params["embedding"][0], np.float64)[np.asarray(tokens)]
  x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + model.config.norm_eps) * p["attention_norm"]
  gate = 1 / (1 + np.exp(-np.einsum("bte,enh->btnh", x, p["memory_gate"])))
  ages = []
  for t in range(LENGTH):  # token s weighs (1 - g_s) and every gate after it
    weights = np.cumprod(np.concatenate([np.ones_like(gate[:, :1]), gate[:, t:0:-1]], axis=1), axis=1)
    weights *= 1 - gate[:, t::-1]
    distances = np.arange(t + 1)[None, :, None, None]
    ages.append((weights * distances).sum(axis=1) / weights.sum(axis=1))
  expected = np.sort(np.mean(ages, axis=(0, 1)), axis=-1)
  np.testing.assert_allclose(of_all("reach", model, params)["age"][0][0], expected, rtol=1e-4)


@pytest.mark.slow
def test_accuracy_by_distance_adds_up_to_the_accuracy():
  model, params = trained()
  found = of_all("distance", model, params)
  tasks = [task for task in hypotheses.TASKS.values() if task.queries * task.values == 1]
  cells = questions.cells(ASKED, model, params, table_row("dilated:8 everywhere"), tasks)
  by_distance = found[str(Dilated(8))]
  assert sum(by_distance["count"]) == COUNT * len(tasks)
  assert np.average(by_distance["right"][0], weights=by_distance["count"]) == pytest.approx(
      np.mean([cell["accuracy"][0] for cell in cells.values()]))
  rights = [[] for _ in range(8)]  # by the steps from a needle's END to a token that is kept
  for name, cell in cells.items():
    made = jax.tree.map(np.asarray, ASKED.sequences(name))
    for tokens, golden, right in zip(made["tokens"], made["golden"], seeds.from_hex(cell)[0], strict=True):
      end = golden.max() + tokens[golden.max():].tolist().index(mini_niah.END)
      rights[next(d for d in range(8) if (end + d + 1) % 8 == 0)].append(right)
  assert by_distance["count"] == [len(x) for x in rights]
  assert by_distance["right"][0] == pytest.approx([100 * np.mean(x) if x else 0.0 for x in rights])


def test_seeds_that_are_too_low_under_dense_are_in_no_figure():
  draw = np.random.default_rng(0)
  numbers = {"heads": {"Quest 16": {"single_2": (3, 2, 2)}}, "random": {"Quest 16": {"single_2": (4, 3)}},
             "layers": {"Quest 16": {"layer 0": {"single_2": (3,)}}},
             "two_by_two": {"dense": {"single_2": (3,)}}, "future": {"1/4": {"multikey_1": {"A": (3,), "B": (3,)}}},
             "reach": {"age": (3, 2, 2, 5)}, "distance": {"dilated:8": {"right": (3, 8)}}}
  made = jax.tree.map(lambda shape: draw.uniform(0, 100, shape), numbers, is_leaf=lambda x: isinstance(x, tuple))
  every = {part: {"a": jax.tree.map(np.ndarray.tolist, one)} for part, one in made.items()}
  every["distance"]["a"]["dilated:8"]["count"] = [3] * 8
  of_dense = lambda *seeds: {"a": {"dense": {"single_2": {"accuracy": list(seeds)}}}}
  left = hypotheses.matched(every, of_dense(95, 94.9, 99))
  for part, one in made.items():
    expected = jax.tree.map(lambda x, axis=int(part == "random"): np.delete(x, 1, axis).tolist(), one)
    found = left[part]["a"]
    if part == "distance":
      assert found["dilated:8"].pop("count") == [3] * 8
    assert found == expected
  assert hypotheses.matched(every, of_dense(94, 94.9, 0)) == every


@pytest.mark.slow
@pytest.mark.scripts
def test_the_script_draws_a_figure_for_each_question_and_keeps_what_is_done(tmp_path):
  model = RATPlusLM(RATPlusConfig(mini_niah.VOCAB_SIZE, 1, 16, 2))
  params = model.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  state = rat_jax.init_train_state(model, params, rat_jax.make_optimizer(1e-3, total_steps=1))
  rat_jax.train.Checkpoints(tmp_path / "a" / "seed-0").save(state, model.config, {})
  ask = ("-m", "experiments.hypotheses", f"--checkpoint={tmp_path}/a", "--length=512", "--count=4",
         f"--workdir={tmp_path}/answers")
  told = run_python(*ask, "--parts=reach,distance")
  assert "reach, a" in told
  assert "distance, a" in told
  assert "a, seed 0, kept, for want of others: dense accuracy below 95 in single_1 " in told
  told = run_python(*ask, "--parts=reach,heads,distance,layers")
  assert "a: heads SnapKV aware" in told
  assert "MoBA 16 prompt, layer 0" in told
  assert "MoBA 16 prompt, 1/16, layer 0" in told
  assert "a: reach" not in told
  assert {path.stem for path in (tmp_path / "answers").glob("*.png")} == {"reach", "heads", "distance", "layers"}


def test_flags_that_would_change_nothing_are_refused():
  for given, message in ((["--parts=heads", "--draws=3"], "--draws: they are of the part random, which is not asked"),
                         (["--parts="], r"--parts=\[\] are unknown; use some of \['heads'")):
    with pytest.raises(ValueError, match=message):
      hypotheses.check(command_line.settings(hypotheses, "--checkpoint=a", *given))
