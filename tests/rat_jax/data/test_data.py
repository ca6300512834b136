"""Text to tokens to batches: the split, the order, what is refused, and that nothing good is overwritten."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import locale
import pathlib
import re
import warnings

import numpy as np
import pytest

from rat_jax.convert.tensors import read_json
from rat_jax.data import BYTES, TokenFile, prepare, prepare_standard_library
from rat_jax.data.token_file import write_token_file
from rat_jax.evaluate import load_ruler
from rat_jax.paths import read_text

# Files in Latin-1, binary ones, and two that are equal lie in the corpus of these tests.
pytestmark = [pytest.mark.filterwarnings("ignore:.*are no UTF-8 text and were passed over"),
              pytest.mark.filterwarnings("ignore:.*are empty, or equal to another")]


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


def test_the_token_files_of_a_folder_are_as_they_were(tmp_path):
  """Digests are of the version before the one that reads byte order marks and cuts small files finer."""
  (tmp_path / "texts").mkdir()
  for i in range(20):
    (tmp_path / "texts" / f"{i}.txt").write_bytes(f"Größe {i}\r\n".encode() * (i + 1))
  files = prepare(tmp_path / "texts", tmp_path / "out", heldout=0.2)
  digests = {name: file.sidecar.sha256[:16] for name, file in files.items()}
  assert digests == {"train": "29e237237045fac4", "heldout": "ef56763d12a76763"}


@pytest.mark.parametrize(("line", "count", "most"), [
    ("word " * 20, 17, 65536 + 4),  # a megabyte and more in one line
    ("line of text\r" * 20, 16, 65536 + 13), ("line of text\r\n" * 20, 16, 65536 + 14),
    ("€" * 40, 9, 2 * 65536 + 2),   # without white space
])
def test_any_long_file_is_cut_and_never_inside_a_character(line, count, most, tmp_path):
  text = "".join(f"{i:06}" + line for i in range(1_000_000 // len(line.encode())))
  (tmp_path / "one.txt").write_bytes(text.encode())
  files = prepare(tmp_path / "one.txt", tmp_path / "out", heldout=0.1)
  pieces = [piece.decode() for piece in documents(files["train"]) + documents(files["heldout"])]
  assert len(pieces) == count
  assert "".join(sorted(pieces, key=text.index)) == text
  assert max(len(piece.encode()) for piece in pieces) <= most
  if line[-1].isspace():
    assert {piece[-1] for piece in pieces} == {line[-1]}


@pytest.mark.parametrize(("lines", "heldout", "shares"), [
    (3000, 0.05, (1, 19)), (3000, 0.25, (1, 3)), (100, 0.05, (1, 1)), (2, 0.05, (1, 1)), (3000, 0.9, (9, 1))])
def test_small_files_are_cut_finer(lines, heldout, shares, tmp_path):
  (tmp_path / "one.txt").write_text("".join(f"line {i:06}\n" for i in range(lines)))
  files = prepare(tmp_path / "one.txt", tmp_path / "out", heldout=heldout)
  assert tuple(files[name].sidecar.documents for name in ("heldout", "train")) == shares
  assert sum(file.sidecar.bytes for file in files.values()) == 12 * lines


def test_files_that_are_passed_over_are_told_of(corpus, tmp_path):
  told = r"^2 of 33 files in .*texts are no UTF-8 text and were passed over, .*/binary.bin first; convert them to"
  with pytest.warns(UserWarning, match=told + r" UTF-8, or leave them out by a pattern\.$"):
    prepare(corpus, tmp_path / "out")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    prepare(corpus, tmp_path / "out", pattern="[0-9]*.txt")
  with pytest.raises(ValueError, match=r"holds 0 bytes .* Give more text\. 1 of 1 files in .*latin.txt first"):
    prepare(corpus, tmp_path / "none", pattern="latin*")
  assert not (tmp_path / "none").exists()


def test_one_file_in_a_folder_is_a_document(tmp_path):
  (tmp_path / "one.txt").write_text("line\n" * 99)
  with pytest.raises(ValueError, match=r"holds 495 bytes .* Give more text, or the one file, to be cut\.$"):
    prepare(tmp_path, tmp_path / "out")


def test_equal_pieces_of_one_file_are_all_kept(tmp_path):
  (tmp_path / "one.txt").write_text("the same line of text.\n\n" * 2000)
  files = prepare(tmp_path / "one.txt", tmp_path / "out")
  assert [files[name].sidecar.documents for name in ("heldout", "train")] == [1, 19]
  assert sum(file.sidecar.bytes for file in files.values()) == 48_000


def test_equal_and_empty_files_of_a_folder_are_told_of(tmp_path):
  (tmp_path / "texts").mkdir()
  for name, text in (("a", "one"), ("b", "one"), ("c", "two"), ("d", " \n"), ("e", ""), ("f", "one")):
    (tmp_path / "texts" / name).write_text(text)
  told = "6 files in .*/texts are empty, or equal to another, and were left out"
  with pytest.warns(UserWarning, match=rf"^4 of {told}\.$"):
    files = prepare(tmp_path / "texts", tmp_path / "out")
  assert sorted(documents(files["train"]) + documents(files["heldout"])) == [b"one", b"two"]
  (tmp_path / "texts" / "c").write_text("one")
  with pytest.raises(ValueError, match=rf"holds 3 bytes of text in 1 .* 5 of {told}\.$"):
    prepare(tmp_path / "texts", tmp_path / "out")


@pytest.mark.parametrize("ids", [[10**6], [1, 10**6]], ids=["in heldout", "in train"])
def test_a_preparation_that_fails_leaves_both_files_as_they_were(ids, corpus, tmp_path):
  prepare(corpus, tmp_path / "out")
  before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
  (tmp_path / "other").mkdir()
  for i in range(200):
    (tmp_path / "other" / str(i)).write_text(f"another {i}")
  given = iter(ids)  # of the one document that is held out, and the next
  broken = dataclasses.replace(BYTES, encode_batch=lambda texts: [[next(given, 1)] for _ in texts])
  with pytest.raises(ValueError, match=r"holds tokens 1000000\.\.1000000, outside the vocabulary"):
    prepare(tmp_path / "other", tmp_path / "out", heldout=0.005, tokenizer=broken)
  assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_what_is_chosen_of_a_source(corpus, tmp_path):
  with pytest.raises(ValueError, match=r"^skip='deep' is one text; give a collection of names, such as \['deep'\]\.$"):
    prepare(corpus, tmp_path / "out", skip="deep")
  for chosen in (dict(skip=["deep"]), dict(pattern="*.md")):
    one = dict(pattern="*", skip=()) | chosen
    told = f"pattern={one['pattern']!r}, skip={one['skip']!r} and {corpus}/0.txt, a single file; give a folder, or"
    with pytest.raises(ValueError, match=f"^{re.escape(told)} leave both out\\.$"):
      prepare(corpus / "0.txt", tmp_path / "out", **chosen)
  assert not (tmp_path / "out").exists()
  assert prepare(corpus, tmp_path / "out", skip=["deep"], pattern="*.txt")["train"].sidecar.documents == 14


def test_an_ascii_locale_changes_nothing(tmp_path):
  """Neither what is read nor what is written."""
  source, file, ruler, sidecar = (tmp_path / name for name in ("Größe", "a.txt", "b.jsonl", "out/train.json"))
  source.mkdir()
  for name in "ab":
    (source / name).write_text(f"é {name}", "utf-8")
  file.write_text("é", "utf-8")
  ruler.write_text('{"input": "é", "outputs": ["ü"]}', "utf-8")
  before = locale.setlocale(locale.LC_CTYPE)
  try:
    locale.setlocale(locale.LC_CTYPE, "C")
    with pytest.raises(UnicodeDecodeError):
      file.read_text()  # so a file would be read that nobody says the encoding of
    assert prepare(source, tmp_path / "out")["train"].sidecar.source == str(source)
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text("utf-8")), ensure_ascii=False), "utf-8")
    assert TokenFile(tmp_path / "out" / "train.bin").sidecar.source == str(source)
    assert (read_text(file), read_json(ruler, "")["input"]) == ("é", "é")
    assert load_ruler(ruler)[0].answers == ("ü",)
  finally:
    locale.setlocale(locale.LC_CTYPE, before)


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(tmp_path):
  (tmp_path / "texts").mkdir()
  for name, data in (("a", b"\xef\xbb\xbfone\r\ntwo\r"), ("b", b"one\r\ntwo\r"), ("c", "é".encode())):
    (tmp_path / "texts" / name).write_bytes(data)
  files = prepare(tmp_path / "texts", tmp_path / "out")
  assert sorted(documents(files["train"]) + documents(files["heldout"])) == [b"one\r\ntwo\r", "é".encode()]
  assert read_text(tmp_path / "texts" / "a") == read_text(tmp_path / "texts" / "b") == "one\r\ntwo\r"
  (tmp_path / "latin").write_bytes(b"caf\xe9")
  with pytest.raises(ValueError, match=r"latin is no UTF-8 text: .* position 3: .*; convert it to UTF-8 first\.$"):
    read_text(tmp_path / "latin")


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


def test_counts_of_any_integer_type_are_the_same_batches(corpus, tmp_path):
  file = prepare(corpus, tmp_path / "out")["train"]
  for step in (3, 2**29, 2**40):
    plain = file.batch(step, batch_size=8, length=16, seed=5)
    kind = np.int32 if step < 2**31 else np.int64
    other = file.batch(kind(step), batch_size=np.int32(8), length=np.int8(16), seed=np.int64(5))
    for name in plain:
      np.testing.assert_array_equal(plain[name], other[name])
  one, other = (list(file.epoch(batch_size=kind(7), length=kind(8), limit=kind(10))) for kind in (int, np.int8))
  np.testing.assert_array_equal([b["tokens"] for b in one], [b["tokens"] for b in other])


@pytest.mark.parametrize("bad", [
    dict(step=1.5), dict(step=-1), dict(step=True), dict(length=0), dict(length=2.0), dict(batch_size=0),
    dict(batch_size=True), dict(seed=-1), dict(seed=0.5), dict(limit=0), dict(limit=-1), dict(limit=2.5)], ids=str)
def test_counts_that_are_none(bad, corpus, tmp_path):
  file = prepare(corpus, tmp_path / "out")["train"]
  ((name, value),) = bad.items()
  least = 0 if name in ("step", "seed") else 1
  message = f"^{name}={re.escape(repr(value))}; use an integer of at least {least}\\.$"
  if name != "limit":
    with pytest.raises(ValueError, match=message):
      file.batch(**dict(step=0, batch_size=2, length=8) | bad)
  if least:
    with pytest.raises(ValueError, match=message):
      file.epoch(**dict(batch_size=2, length=8) | bad)  # before a batch is asked for


def test_documents_apart(corpus, tmp_path):
  file = prepare(corpus, tmp_path / "out")["train"]
  batch = file.batch(0, batch_size=4, length=64, documents_apart=True)
  tokens, ids = batch["tokens"], batch["segment_ids"]
  assert (ids[:, 0] == 1).all()
  np.testing.assert_array_equal(np.diff(ids, axis=1), tokens[:, :-1] == 0)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b"  \n ", "is empty"), (b"a\0b", "not UTF-8 text"), (b"\xff\xfe", "not UTF-8 text"),
    (b"short", r"holds 5 bytes of text in 1 different documents; .* needs two or more\. Give more text\.$"),
    (b"\xef\xbb\xbf", "is empty"),
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
  with pytest.raises(ValueError, match=r"empty holds 0 bytes of text in 0 different documents; .* Give more text\.$"):
    prepare(tmp_path / "empty", tmp_path / "out")
  with pytest.raises(ValueError, match=r"heldout=1\.5"):
    prepare(tmp_path, tmp_path / "out", heldout=1.5)


def change_sidecar(path, **fields):
  beside = path.with_suffix(".json")
  beside.write_text(json.dumps(json.loads(beside.read_text()) | fields))


@pytest.mark.parametrize(("fields", "message"), [
    (dict(tokens=5), "sidecar says tokens=5"), (dict(dtype="uint16"), "of uint16"),
    (dict(dtype="float32"), "dtype='float32'"), (dict(eod_id=256), "eod_id=256"), (dict(colour="red"), "no sidecar"),
    (dict(bytes=-1), r"train\.json: bytes=-1; give"), (dict(bytes="9"), "bytes='9'"), (dict(bytes=True), "bytes=True"),
    (dict(sha256="12"), "sha256='12'; give 64"), (dict(sha256=5), "sha256=5"),
    (dict(eod_id=1.5), r"train\.json: eod_id=1\.5; give an integer\.$"), (dict(tokens=True), "tokens=True; give an"),
    (dict(vocab_size="256"), r"train\.json: vocab_size='256'; give an integer\.$"), (dict(dtype=8), "dtype=8; use"),
    (dict(tokenizer=None), r"train\.json: tokenizer=None; give a text\.$"), (dict(documents=None), "documents=None;"),
    (dict(source=["a"]), r"train\.json: source=\['a'\]; give a text\.$"),
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
  for text in ("[" * 10**5, '{"tokens": ' + "1" * 5000 + "}"):
    file.path.with_suffix(".json").write_text(text)
    with pytest.raises(ValueError, match=r"heldout\.json is no sidecar of a token file: "):
      TokenFile(file.path)
  with pytest.raises(FileNotFoundError, match=r"/out is no file; `python -m experiments\.prepare_data` writes"):
    TokenFile(tmp_path / "out")
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

def test_a_sidecar_knows_the_bytes_of_the_text_and_the_file(tmp_path):
  """Whatever the tokens are: bits per byte then are the same for all tokenizers."""
  (tmp_path / "texts").mkdir()
  for name, text in (("a", "\ufeffcafé"), ("b", "caffè"), ("c", "€")):
    (tmp_path / "texts" / name).write_text(text, "utf-8")
  pairs = dataclasses.replace(BYTES, name="pairs", encode_batch=lambda texts: [[1, 2] for _ in texts])
  for one, tokens in ((BYTES, 17), (pairs, 9)):
    files = prepare(tmp_path / "texts", tmp_path / one.name, tokenizer=one).values()
    assert sum(file.sidecar.bytes for file in files) == 14
    assert sum(file.sidecar.tokens for file in files) == tokens
    for file in files:
      assert file.sidecar.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()


def test_sidecars_of_older_versions_are_read(corpus, tmp_path):
  path = prepare(corpus, tmp_path / "out")["train"].path
  beside = path.with_suffix(".json")
  fields = json.loads(beside.read_text())
  older = {name: value for name, value in fields.items() if name not in ("bytes", "sha256")}
  beside.write_text("\ufeff" + json.dumps(older), "utf-8")
  sidecar = TokenFile(path).sidecar
  assert (sidecar.bytes, sidecar.sha256, sidecar.tokens) == (None, None, fields["tokens"])
  written = write_token_file(path, [np.array([1])], vocab_size=256, eod_id=0, tokenizer="t", source="s")
  assert (TokenFile(path).sidecar, written.bytes) == (written, None)
  beside.write_bytes(b"\xff")
  with pytest.raises(ValueError, match=r"train\.json is no sidecar of a token file: .*train\.json is no UTF-8 text"):
    TokenFile(path)
