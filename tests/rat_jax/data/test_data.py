"""Text to tokens to batches: the split, the order, what is refused, and that nothing good is overwritten."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rat_jax.data import TokenFile, permute, prepare, prepare_standard_library
from rat_jax.data.token_file import write_token_file


@pytest.fixture
def corpus(tmp_path):
  folder = tmp_path / "texts"
  (folder / "deep").mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(30):
    words = "".join(rng.choice(list("abcdefgh "), 20 + i))
    (folder / ("deep" if i % 2 else ".") / f"{i}.txt").write_text(f"document {i} {words}")
  (folder / "copy.txt").write_text((folder / "0.txt").read_text())
  (folder / "binary.bin").write_bytes(b"\0\1\2")
  (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
  return folder


def documents(file):
  return bytes(file.tokens).split(b"\0")[:-1]


def test_every_document_once_and_on_one_side(corpus, tmp_path):
  files = prepare(corpus, tmp_path / "out", heldout=0.2)
  train, heldout = documents(files["train"]), documents(files["heldout"])
  assert len(heldout) == 6
  assert sorted(train + heldout) == sorted({p.read_bytes() for p in corpus.rglob("[0-9]*.txt")})
  assert files["train"].sidecar.documents == 24
  assert files["train"].sidecar.source == str(corpus)
  assert files["train"].tokens.dtype == np.uint8
  again = prepare(corpus, tmp_path / "again", heldout=0.2)
  np.testing.assert_array_equal(again["train"].tokens, files["train"].tokens)


def test_one_file_is_cut_at_line_ends(tmp_path):
  text = "".join(f"line {i}\n" for i in range(40_000))
  (tmp_path / "one.txt").write_text(text)
  files = prepare(tmp_path / "one.txt", tmp_path / "out", heldout=0.3)
  pieces = documents(files["train"]) + documents(files["heldout"])
  assert all(piece.endswith(b"\n") for piece in pieces)
  assert sum(map(len, pieces)) == len(text)


def test_the_standard_library_is_there(tmp_path):
  files = prepare_standard_library(tmp_path)
  assert files["train"].sidecar.tokens > 3_000_000
  assert files["heldout"].sidecar.tokens > 100_000
  assert b"import" in bytes(files["heldout"].tokens)


def test_batches_are_windows_of_the_file(corpus, tmp_path):
  file = prepare(corpus, tmp_path / "out")["train"]
  flat, length = np.asarray(file.tokens).astype(int), 16
  windows = file.windows(length)
  seen = []
  for step in range(3):
    batch = file.batch(step, batch_size=5, length=length, seed=3)
    again = file.batch(step, batch_size=5, length=length, seed=3)
    for name in batch:
      np.testing.assert_array_equal(batch[name], again[name])
    assert (file.batch(step, batch_size=5, length=length, seed=4)["tokens"] != batch["tokens"]).any()
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
      start = next(i * length for i in range(windows) if (flat[i * length:(i + 1) * length] == tokens).all())
      seen.append(start)
      expected = np.where(tokens == 0, -100, flat[start + 1:start + length + 1])
      np.testing.assert_array_equal(targets, expected)
  assert len(set(seen)) == 15


def test_every_window_comes_once_per_epoch(corpus, tmp_path):
  file = prepare(corpus, tmp_path / "out")["train"]
  windows = file.windows(8)
  rows = np.concatenate([file.batch(step, batch_size=1, length=8)["tokens"] for step in range(2 * windows)])
  in_order = np.concatenate([b["tokens"] for b in file.epoch(batch_size=1, length=8)])
  for epoch in (rows[:windows], rows[windows:]):
    np.testing.assert_array_equal(np.unique(epoch, axis=0), np.unique(in_order, axis=0))
  assert (rows[:windows] != rows[windows:]).any()


def test_evaluation_covers_the_file_and_ignores_what_fills_up(corpus, tmp_path):
  file = prepare(corpus, tmp_path / "out")["train"]
  batches = list(file.epoch(batch_size=7, length=8))
  counted = sum((b["targets"] != -100).sum() for b in batches)
  ends = (np.asarray(file.tokens[:file.windows(8) * 8]) == 0).sum()
  assert counted == file.windows(8) * 8 - ends
  assert sum(len(b["tokens"]) for b in file.epoch(batch_size=7, length=8, limit=10)) == 14


def test_documents_apart(corpus, tmp_path):
  file = prepare(corpus, tmp_path / "out")["train"]
  batch = file.batch(0, batch_size=4, length=64, documents_apart=True)
  tokens, ids = batch["tokens"], batch["segment_ids"]
  assert (ids[:, 0] == 1).all()
  np.testing.assert_array_equal(np.diff(ids, axis=1), tokens[:, :-1] == 0)


@given(st.integers(1, 300), st.integers(0, 10**9))
def test_permutations(size, seed):
  assert sorted(permute(np.arange(size), size, seed)) == list(range(size))


def test_permutations_differ_and_mix():
  a, b = permute(np.arange(1000), 1000, 0), permute(np.arange(1000), 1000, 1)
  assert (a == b).mean() < 0.02
  assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b"  \n ", "is empty"), (b"a\0b", "not UTF-8 text"), (b"\xff\xfe", "not UTF-8 text"),
    (b"short", "needs two or more"),
])
def test_bad_files_are_refused_and_harm_nothing(content, message, corpus, tmp_path):
  good = prepare(corpus, tmp_path / "out")["train"].path
  before = good.read_bytes()
  (tmp_path / "bad").write_bytes(content)
  with pytest.raises(ValueError, match=message):
    prepare(tmp_path / "bad", tmp_path / "out")
  assert good.read_bytes() == before


def test_an_unreadable_file_is_named(corpus, tmp_path, monkeypatch):
  def refuse(path):
    raise PermissionError(13, "Permission denied")

  monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
  for source in (corpus, corpus / "0.txt"):
    with pytest.raises(ValueError, match=r"\.txt cannot be read \(Permission denied\)|binary.bin cannot be read"):
      prepare(source, tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_bad_sources(tmp_path):
  with pytest.raises(FileNotFoundError, match="does not exist"):
    prepare(tmp_path / "nowhere", tmp_path)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="holds 0 documents"):
    prepare(tmp_path / "empty", tmp_path / "out")
  with pytest.raises(ValueError, match=r"heldout=1\.5"):
    prepare(tmp_path, tmp_path / "out", heldout=1.5)


def change_sidecar(path, **fields):
  beside = path.with_suffix(".json")
  beside.write_text(json.dumps(json.loads(beside.read_text()) | fields))


@pytest.mark.parametrize(("fields", "message"), [
    (dict(tokens=5), "sidecar says tokens=5"), (dict(dtype="uint16"), "of uint16"),
    (dict(dtype="float32"), "dtype='float32'"), (dict(eod_id=256), "eod_id=256"), (dict(colour="red"), "no sidecar"),
])
def test_a_sidecar_that_does_not_fit(fields, message, corpus, tmp_path):
  path = prepare(corpus, tmp_path / "out")["train"].path
  change_sidecar(path, **fields)
  with pytest.raises(ValueError, match=message):
    TokenFile(path)


def test_missing_and_short_files(corpus, tmp_path):
  file = prepare(corpus, tmp_path / "out")["heldout"]
  with pytest.raises(ValueError, match="too few for one window of length=100000"):
    file.batch(0, batch_size=1, length=100_000)
  change_sidecar(file.path, vocab_size=50)
  with pytest.raises(ValueError, match=r"outside the vocabulary 0\.\.49"):
    TokenFile(file.path).batch(0, batch_size=1, length=8)
  file.path.with_suffix(".json").unlink()
  with pytest.raises(FileNotFoundError, match=r"heldout\.json does not exist"):
    TokenFile(file.path)


def test_wide_vocabularies(tmp_path):
  for vocab_size, dtype in ((256, "uint8"), (65536, "uint16"), (100352, "uint32")):
    path = tmp_path / f"{vocab_size}.bin"
    document = np.array([1, vocab_size - 1])
    write_token_file(path, [document], vocab_size=vocab_size, eod_id=0, tokenizer="t", source="s")
    assert TokenFile(path).sidecar.dtype == dtype
    np.testing.assert_array_equal(TokenFile(path).tokens, [1, vocab_size - 1, 0])
  with pytest.raises(ValueError, match="outside the vocabulary"):
    write_token_file(path, [np.array([7])], vocab_size=5, eod_id=0, tokenizer="t", source="s")
  np.testing.assert_array_equal(TokenFile(path).tokens, [1, 100351, 0])
