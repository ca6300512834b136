"""Mini-NIAH's sequences, read by an independent reader; the scores on hand-graded strings; RULER's files."""

from __future__ import annotations

import itertools
import json
import re

import jax
import numpy as np
import pytest
import scipy.stats

from rat_jax.evaluate import comma_recall, exact_match, load_ruler, mini_niah, string_match_all, string_match_part
from rat_jax.evaluate.mini_niah import TASKS, Rows, evaluation_rows, training_rows

batch = jax.jit(mini_niah.batch, static_argnums=(0, 1, 2))
PAD, BOS, EOS, NDL, IS, END, QRY, ANS, SEP = range(9)


def split(tokens, separator):
  parts = [[]]
  for token in tokens:
    parts.append([]) if token == separator else parts[-1].append(token)
  return [tuple(part) for part in parts]


def read(tokens):
  """(needles as (key, value, start), filler tokens, questions as (keys, values)) of one sequence, by a plain walk."""
  tokens = tokens.tolist()
  assert tokens[0] == BOS
  first = tokens.index(QRY)
  needles, filler, i = [], [], 1
  while i < first:
    if tokens[i] == NDL:
      middle, end = tokens.index(IS, i), tokens.index(END, i)
      needles.append((tuple(tokens[i + 1:middle]), tuple(tokens[middle + 1:end]), i))
      i = end + 1
    else:
      assert 208 <= tokens[i] < 256
      filler.append(tokens[i])
      i += 1
  questions = []
  for question in split(tokens[first:], QRY)[1:]:
    at = question.index(ANS)
    assert question[-1] == EOS
    questions.append((split(question[:at], SEP), split(question[at + 1:-1], SEP)))
  return needles, filler, questions


def answer_of(needles, keys):
  return [value for key in keys for found, value, _ in needles if found == key]


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_answer_is_in_its_context(task):
  length = 160
  made = jax.tree.map(np.asarray, batch(evaluation_rows(task, 40), length, 7, 3))
  depths = []
  for row in range(40):
    needles, filler, questions = read(made["tokens"][row])
    room = length - 1 - task.query_length - task.answer_length
    assert len(filler) + len(needles) * task.needle_length == room
    if task.filler == "needles":
      assert len(needles) == room // task.needle_length
    else:
      assert len(needles) == task.keys * task.values
    by_key = {}
    for key, value, _ in needles:
      assert len(key) == task.key_length
      assert len(value) == task.value_length
      assert all(16 <= s < 112 for s in key)
      assert all(112 <= s < 208 for s in value)
      by_key.setdefault(key, []).append(value)
    assert {len(values) for values in by_key.values()} == {task.values}  # keys are distinct
    ((keys, values),) = questions
    assert len(set(keys)) == task.queries
    assert values == answer_of(needles, keys)
    question, answer = made["question"][row], made["answer"][row]
    assert made["tokens"][row, question] == QRY
    assert made["tokens"][row, answer - 1] == ANS
    np.testing.assert_array_equal(np.flatnonzero(made["answers"][row]), np.arange(answer - 1, length - 1))
    np.testing.assert_array_equal(made["targets"][row, :-1], made["tokens"][row, 1:])
    assert made["targets"][row, -1] == -100
    at = made["golden"][row, answer - 1:]  # SEP and EOS stand nowhere
    spoken = [s for value in values for s in value]
    assert made["tokens"][row, at[at >= 0]].tolist() == spoken
    starts = [start for key, _, start in needles if key in keys]
    assert set(starts) == {p - task.key_length - 2 for p in at[at >= 0][::task.value_length].tolist()}
    depths += [start / (room - task.needle_length + 1) for start in starts]
    if task.filler == "repeated":  # a paragraph of twelve over and over, wherever the needle stands
      context = made["tokens"][row, :question]
      for place in range(12):
        assert len({token for token in context[place::12].tolist() if token >= 208}) == 1
  assert 0.4 < np.mean(depths) < 0.6
  assert 0.2 < np.std(depths) < 0.37  # of a uniform depth: 0.29
  assert scipy.stats.kstest(depths, "uniform").pvalue > 0.01
  if task.filler == "markov":
    successors = {}
    for row in range(40):
      _, filler, _ = read(made["tokens"][row])
      for a, b in itertools.pairwise(filler):
        successors.setdefault(a, set()).add(b)
    assert np.mean([len(s) for s in successors.values()]) < 8  # four, and what a needle comes between


@pytest.mark.slow
def test_training_rows_are_packed_and_weigh_fresh_questions():
  counts = {"single_1": 3, "single_2": 3, "single_3": 5, "multikey_1": 4, "multikey_2": 10, "multikey_3": 16,
            "multivalue": 14, "multiquery": 9}
  length = 384
  rows = training_rows(counts, length)
  assert sum(kind.count for kind in rows) == 64
  made = jax.tree.map(np.asarray, batch(rows, length, 0, 11))
  assert made["tokens"].shape == (64, length)
  names, numbers, single = list(TASKS), [], 0
  for row in range(64):
    task = TASKS[names[made["task"][row]]]
    needles, _, questions = read(made["tokens"][row])
    asked, fresh = set(), 0
    for keys, values in questions:
      assert values == answer_of(needles, keys)
      fresh += not asked & set(keys)
      asked |= set(keys)
    assert made["answers"][row].sum() == fresh * task.answer_length
    assert fresh == min(len(questions), len({key for key, _, _ in needles}) // task.queries)
    single += len(questions) == 1
    if task.filler == "markov" and task.queries == task.values == 1:
      numbers.append(len(needles))
  assert single == 21
  assert set(numbers) <= set(range(1, 9))
  assert len(set(numbers)) > 4


def test_questions_take_a_quarter_of_a_short_row_at_most():
  questions = lambda name, length: training_rows({name: 3}, length)[0].questions
  assert [questions("multikey_3", length) for length in (24, 128, 256, 512, 1024)] == [1, 2, 4, 8, 8]  # of 13 tokens
  assert [questions("multiquery", length) for length in (64, 128, 256, 512, 1024)] == [1, 1, 3, 4, 4]  # of 21


def test_a_row_depends_on_seed_step_and_place_alone():
  task = TASKS["multikey_1"]
  many = batch(evaluation_rows(task, 8), 64, 1, 5)["tokens"]
  np.testing.assert_array_equal(batch(evaluation_rows(task, 3), 64, 1, 5)["tokens"], many[:3])
  np.testing.assert_array_equal(batch(evaluation_rows(task, 8), 64, 1, np.int32(5))["tokens"], many)
  for other in (batch(evaluation_rows(task, 8), 64, 2, 5), batch(evaluation_rows(task, 8), 64, 1, 6)):
    assert (np.asarray(other["tokens"]) != np.asarray(many)).any(axis=1).all()


@pytest.mark.slow
def test_near_misses_and_spacing():
  task = TASKS["multikey_2"]
  made = np.asarray(batch(evaluation_rows(task, 20, near_miss=1.0), 200, 0, 0)["tokens"])
  for tokens in made:
    needles, _, (((asked,), _),) = read(tokens)
    assert {key[0] for key, _, _ in needles} == {asked[0]}
  made = np.asarray(batch(evaluation_rows(task, 4, near_miss=1.0), 1024, 0, 0)["tokens"])  # more than such keys
  for tokens in made:
    needles, _, (((asked,), _),) = read(tokens)
    assert len({key for key, _, _ in needles}) == len(needles) == 145
    assert sum(key[0] == asked[0] for key, _, _ in needles) >= 48
  with pytest.raises(ValueError, match=r"keys=\(100, 100\): multikey_1 has keys of one symbol"):
    mini_niah.batch((Rows(TASKS["multikey_1"], 1, keys=(100, 100)),), 1024, 0, 0)
  made = np.asarray(batch((Rows(TASKS["multikey_1"], 20, keys=(4, 4), spacing=32),), 256, 0, 0)["tokens"])
  for tokens in made:
    starts = [start for _, _, start in read(tokens)[0]]
    assert (np.diff(starts) >= 32).all()
  with pytest.raises(ValueError, match=r"length=20 leaves 13 tokens of context to multikey_1 .* too few for 4 needles"):
    mini_niah.batch(evaluation_rows(TASKS["multikey_1"], 1), 20, 0, 0)
  for task, fields, message in (("multiquery", dict(keys=(2, 2)), r"keys=\(2, 2\); give \(least, most\), 4 at least"),
                                ("single_1", dict(keys=(0, 4)), r"keys=\(0, 4\)"),
                                ("single_1", dict(keys=(5, 3)), r"keys=\(5, 3\)"),
                                ("single_1", dict(questions=0), "questions=0; use 1 or more"),
                                ("single_1", dict(spacing=-5), "spacing=-5; use 0 or more"),
                                ("multikey_2", dict(near_miss=2.0), "near_miss=2.0; use a share")):
    with pytest.raises(ValueError, match=message):
      Rows(TASKS[task], 1, **fields)
  with pytest.raises(ValueError, match="rows is empty"):
    mini_niah.batch((), 100, 0, 0)


# prediction, references, and by hand: RULER's score, the authors', exact match
GRADED = [
    ("1234567", ["1234567"], 100, 100, 100),
    ("The number is 1234567.", ["1234567"], 100, 0, 0),
    ("991234567", ["1234567"], 100, 0, 0),  # inside a longer number
    ("123456", ["1234567"], 0, 0, 0),
    ("", ["1234567"], 0, 0, 0),
    ("Blue-Cat", ["blue-cat"], 100, 0, 0),  # case
    ("blue-cat", ["BLUE-CAT"], 100, 0, 0),
    ("1, 2, 3, 4", ["1", "2", "3", "4"], 100, 100, 100),
    ("4, 3, 2, 1", ["1", "2", "3", "4"], 100, 100, 0),  # order
    ("1,2", ["1", "2", "3", "4"], 50, 50, 0),
    ("1 2 3 4", ["1", "2", "3", "4"], 100, 0, 0),
    ("1,1,1,1", ["1", "2"], 50, 50, 0),
    ("7,7", ["7", "7"], 100, 50, 100),  # duplicate references
    ("7", ["7", "7"], 100, 50, 0),
    (" 5 ,6 ", ["5", "6"], 100, 100, 100),
    ("5,,6", ["5", "6"], 100, 100, 0),
    ("5;6", ["5", "6"], 100, 0, 0),
    ("a,b,c", ["a,b"], 100, 0, 0),  # a reference that holds a comma
    ("12,3", ["1", "2", "3"], 100, 100 / 3, 0),
    ("1,2,3,", ["1", "2", "3"], 100, 100, 0),
]


@pytest.mark.parametrize(("prediction", "references", "ruler", "authors", "exact"), GRADED)
def test_hand_graded_strings(prediction, references, ruler, authors, exact):
  assert string_match_all([prediction], [references]) == pytest.approx(ruler)
  assert comma_recall([prediction], [references]) == pytest.approx(authors)
  assert exact_match([prediction], [references]) == pytest.approx(exact)


@pytest.mark.parametrize(("prediction", "references", "part"), [
    ("In France.", ["France", "in France", "French"], 100),  # one of three right answers, and RULER's full score
    ("IN FRANCE", ["france"], 100), ("Spain", ["France", "Gaul"], 0), ("", ["France"], 0), ("a, b", ["a", "b"], 100),
])
def test_the_best_of_several_right_answers_counts(prediction, references, part):
  assert string_match_part([prediction], [references]) == part
  assert string_match_part([prediction, "nothing"], [references, references]) == part / 2


def test_scores_are_means_over_examples():
  predictions, references = [row[0] for row in GRADED], [row[1] for row in GRADED]
  for i, score in ((2, string_match_all), (3, comma_recall), (4, exact_match)):
    assert score(predictions, references) == pytest.approx(np.mean([row[i] for row in GRADED]))
  for score in (string_match_all, string_match_part, comma_recall, exact_match):
    for bad in ((["a"], []), ([], []), (["a"], [[]]), (["a"], ["a"])):
      with pytest.raises(ValueError, match="references"):
        score(*bad)


@pytest.mark.parametrize(("predictions", "references", "message"), [
    ("a", [["a"]], "predictions='a'; give a list with one entry for every example."),
    (5, [["a"]], "predictions=5; give a list with one entry for every example."),
    (["a"], "a", "references='a'; give a list with one entry for every example."),
    (["a"], 5, "references=5; give a list with one entry for every example."),
    (["a", 7], [["a"], ["7"]], "predictions[1]=7; give a text."),
    (["a", None], [["a"], ["b"]], "predictions[1]=None; give a text."),
    (["a", "b"], [["a"], 5], "references[1]=5; give a list of one or more answers for every prediction."),
    (["a", "b"], [["a"], ["b", 12]], "references[1][1]=12; give a text that is not empty."),
    (["a"], [[""]], "references[0][0]=''; give a text that is not empty."),
])
def test_what_no_score_can_be_made_of(predictions, references, message):
  for score in (string_match_all, string_match_part, comma_recall, exact_match):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
      score(predictions, references)
  assert exact_match(np.array(["a", "b"]), (("a",), np.array(["c"]))) == 50


def test_rulers_files(tmp_path):
  path = tmp_path / "validation.jsonl"
  older = {"index": 4, "input": "A needle. What is it? It is", "outputs": ["12"], "length": 30}
  newer = {"index": 0, "input": "A needle. What is it?", "outputs": ["12", "13"], "length": 31,
           "length_w_model_temp": 40, "answer_prefix": " It is", "token_position_answer": 3}
  path.write_text("\n".join(map(json.dumps, (older, newer))) + "\n\n")
  first, second = load_ruler(path)
  assert first.prompt == second.prompt == "A needle. What is it? It is"
  assert (first.answers, second.answers, first.length) == (("12",), ("12", "13"), 30)
  for line, message in (('{"input": "x"}', r"line 2 lacks \['outputs'\]"), ("{", "line 2 is not JSON"),
                        ('{"input": "x", "outputs": []}', r"line 2: outputs=\[\]"), ("[]", "line 2 lacks"),
                        ('{"input": "x", "outputs": [null]}', r"line 2: outputs=\[None\]"),
                        ('{"input": "x", "outputs": ["1", ""]}', r"line 2: outputs=\['1', ''\]"),
                        ('{"input": 5, "outputs": ["1"]}', "line 2: input=5; give a text"),
                        ('{"input": "x", "outputs": [' + "1" * 5000 + "]}", "line 2 is not JSON: Exceeds the limit"),
                        ('{"input": "x", "outputs": ' + "[" * 10**5, "line 2 is not JSON: "),
                        ('{"input": "x", "outputs": [true]}', r"line 2: outputs=\[True\]"),
                        ('{"input": "x", "outputs": ["1"], "length": "9"}', "line 2: length='9'"),
                        ('{"input": "x", "outputs": ["1"], "answer_prefix": 0}', "line 2: answer_prefix=0")):
    path.write_text(json.dumps(older) + "\n" + line)
    with pytest.raises(ValueError, match=message):
      load_ruler(path)
  path.write_bytes(b"\xef\xbb\xbf" + json.dumps(older).encode())  # with a byte order mark
  assert load_ruler(path) == [first]
  for end in ("\r\n", "\r"):  # as other systems write lines
    path.write_bytes(end.join(map(json.dumps, (older, newer))).encode())
    assert load_ruler(path) == [first, second]
  path.write_bytes(b"\xff\xfe")
  with pytest.raises(ValueError, match="is no UTF-8 text"):
    load_ruler(path)
  path.write_text("\n")
  with pytest.raises(ValueError, match="holds no example"):
    load_ruler(path)
  with pytest.raises(FileNotFoundError, match="does not exist"):
    load_ruler(tmp_path / "nothing.jsonl")
  with pytest.raises(FileNotFoundError, match=r" is no file; give a \.jsonl file of RULER\.$"):
    load_ruler(tmp_path)
