"""Tokenizers: what is encoded is what was said, and a model of another vocabulary is refused."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, strategies as st

from experiments.shared import inputs
from rat_jax import RATPlusConfig, RATPlusLM, save_pretrained
from rat_jax.data import BYTES, load_tokenizer, prepare

TEXT = "Needles lie in haystacks. The number of the blue lamp is 4711; who finds it?\n" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A byte-level BPE tokenizer as a Hugging Face folder, and a sentencepiece model in a folder of its own."""
  made = tmp_path_factory.mktemp("tokenizers")
  bpe = tokenizers.ByteLevelBPETokenizer()
  bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<unk>", "<|endoftext|>", "</s>"])
  (made / "hf").mkdir()
  bpe.save(str(made / "hf" / "tokenizer.json"))
  (made / "text.txt").write_text(TEXT)
  (made / "sp").mkdir()
  sentencepiece.SentencePieceTrainer.train(
      input=str(made / "text.txt"), model_prefix=str(made / "sp" / "tokenizer"), vocab_size=300, byte_fallback=True,
      hard_vocab_limit=False, remove_extra_whitespaces=False, normalization_rule_name="identity", minloglevel=2)
  return made


def pieces_tokenizer(path, *merges, **settings):
  """A `tokenizers` JSON as LLaMA's: "▁" for a space and before a text, bytes for what its vocabulary lacks."""
  vocab = {name: i for i, name in enumerate(["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))])}
  for piece in [*"▁abcdefghijklmnopqrstuvwxyzT0123456789,.;:", *("".join(merge) for merge in merges)]:
    vocab[piece] = len(vocab)
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=list(merges), unk_token="<unk>",
                                                    byte_fallback=True))
  to, back = tokenizers.normalizers, tokenizers.decoders
  made.normalizer = to.Sequence([to.Prepend("▁"), to.Replace(" ", "▁")])
  made.decoder = back.Sequence([back.Replace("▁", " "), back.ByteFallback(), back.Fuse(), back.Strip(" ", 1, 0)])
  made.save(str(path))
  return load_tokenizer(path)


@pytest.mark.parametrize("source", ["hf", "hf/tokenizer.json", "sp", "sp/tokenizer.model"])
def test_files_give_what_their_own_libraries_give(folder, source):
  ours = load_tokenizer(folder / source)
  text = "The blue lamp é 4711"
  if source.startswith("hf"):
    theirs = tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert (ours.eod_id, ours.vocab_size) == (theirs.token_to_id("<|endoftext|>"), theirs.get_vocab_size())
  else:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sp" / "tokenizer.model"))
    assert ours.encode(text) == theirs.encode(text)
    assert (ours.eod_id, ours.vocab_size) == (theirs.eos_id(), theirs.vocab_size())
  assert ours.decode([*ours.encode(text), ours.vocab_size + 5]) == text
  assert "sha256:" in ours.name
  assert load_tokenizer(str(ours)).name == ours.name


def test_ids_that_are_not_known_are_left_out(folder):
  for one in (BYTES, load_tokenizer(folder / "hf"), load_tokenizer(folder / "sp")):
    a, b = one.encode("lamp"), one.encode(" blue")
    assert one.decode([-1, *a, one.vocab_size, *b, -(2**40)]) == one.decode([*a, *b])
  assert BYTES.decode([-1, 97, 256]) == "a"


def test_a_text_of_bytes_holds_no_end_of_a_document():
  told = r"^the text holds NUL as its character 1, which ends a document of bytes; leave it out of the text\.$"
  for call in (lambda: BYTES.encode("a\0b"), lambda: BYTES.encode_batch(["a", "é\0"]),
               lambda: BYTES.encode_after("a", "\0")):
    with pytest.raises(ValueError, match=told):
      call()


@given(text=st.text(st.characters(exclude_characters="\0")))  # NUL ends a document of bytes
def test_text_comes_back(folder, text):
  for one in (BYTES, load_tokenizer(folder / "hf")):
    if not any("\ud800" <= c <= "\udfff" for c in text):
      assert one.decode(one.encode(text)) == text


def test_an_end_that_is_written_in_a_text_is_no_end(folder):
  for one in (load_tokenizer(folder / "hf"), load_tokenizer(folder / "sp")):
    assert one.eod_id not in one.encode("a</s>b<|endoftext|>c")


def test_the_end_can_be_named_and_is_read_from_the_folder(folder):
  by_name = load_tokenizer(folder / "hf", end="</s>").eod_id
  assert by_name == tokenizers.Tokenizer.from_file(str(folder / "hf" / "tokenizer.json")).token_to_id("</s>")
  beside = folder / "hf" / "tokenizer_config.json"
  beside.write_text(json.dumps({"eos_token": {"content": "</s>"}}))
  assert load_tokenizer(folder / "hf").eod_id == by_name
  for text, message in (("{", "is not JSON"), ('["</s>"]', "holds a list; give an object with eos_token")):
    beside.write_text(text)
    with pytest.raises(ValueError, match=f"tokenizer_config.json {message}"):
      load_tokenizer(folder / "hf")
  beside.unlink()
  with pytest.raises(ValueError, match="no end-of-document token <end>"):
    load_tokenizer(folder / "hf", end="<end>")
  with pytest.raises(ValueError, match="no end-of-document token <end>"):
    load_tokenizer(folder / "sp", end="<end>")


def test_bad_sources_are_named(folder):
  with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
    load_tokenizer(folder / "nowhere")
  with pytest.raises(FileNotFoundError, match="neither tokenizer"):
    load_tokenizer(folder)
  with pytest.raises(ValueError, match="end='</s>' of the tokenizer \"bytes\""):
    load_tokenizer("bytes", end="</s>")
  for name in ("broken.json", "broken.model"):
    (folder / name).write_text("{")
    with pytest.raises(ValueError, match=name):
      load_tokenizer(folder / name)


def test_a_model_of_another_vocabulary_is_refused(folder):
  one = load_tokenizer(folder / "hf")
  one.check(RATPlusConfig(one.vocab_size, 1, 8, 1))
  one.check(RATPlusConfig(one.vocab_size + 64, 1, 8, 1))
  for size in (one.vocab_size - 1, one.vocab_size + 1024):
    with pytest.raises(ValueError, match=f"vocab_size={size} of the model does not fit"):
      one.check(RATPlusConfig(size, 1, 8, 1))


@pytest.mark.parametrize("source", ["hf", "sp"])
def test_token_files_hold_the_documents(folder, tmp_path, source):
  one, texts = load_tokenizer(folder / source), {f"Document {i}: the lamp é is {i}.\n" for i in range(150)}
  (tmp_path / "texts").mkdir()
  for i, text in enumerate(sorted(texts)):
    (tmp_path / "texts" / f"{i}.txt").write_text(text)
  files = prepare(tmp_path / "texts", tmp_path / "out", tokenizer=one)
  sidecar = files["train"].sidecar
  assert (sidecar.tokenizer, sidecar.vocab_size, sidecar.eod_id) == (one.name, one.vocab_size, one.eod_id)
  ids = np.concatenate([file.tokens for file in files.values()])
  ends = np.flatnonzero(ids == one.eod_id)
  starts = [0, *(ends[:-1] + 1)]
  assert {one.decode(ids[a:b].tolist()) for a, b in zip(starts, ends, strict=True)} == texts


def test_a_saved_model_refuses_a_tokenizer_that_it_was_not_trained_with(folder, tmp_path):
  config = RATPlusConfig(256, 1, 8, 1)
  params = RATPlusLM(config).init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
  save_pretrained(tmp_path / "silent", config, params, about={"trained": "by somebody"})
  save_pretrained(tmp_path / "saved", config, params, about={"trained": '{"tokenizer": "bytes"}'}, max_file_bytes=1000)
  (tmp_path / "texts").mkdir()
  for name in ("one", "two"):
    (tmp_path / "texts" / name).write_text(name)
  data = prepare(tmp_path / "texts", tmp_path / "data", tokenizer=load_tokenizer(folder / "hf"))["train"]
  for name, kept, message in (("silent", {}, "vocab_size=256 of the model does not fit"),
                              ("saved", {"tokenizer": "bytes"}, r"the tokenizer bytes, and this is tokenizer\.json")):
    found, _, notes = inputs.load_model(str(tmp_path / name))
    assert (found, notes) == (config, kept)
    inputs.check_tokenizer(BYTES, config, notes)
    with pytest.raises(ValueError, match=message):
      inputs.check_tokenizer(load_tokenizer(folder / "hf"), config, notes)
    with pytest.raises(ValueError, match=message):
      inputs.check_data(data, config, notes)
  (tmp_path / "saved" / "config.json").write_text('{"model_type": "olmo2", "vocab_size": 256}')
  with pytest.raises(ValueError, match=r"saved/config\.json lacks \['hidden_size', "):
    inputs.load_model(str(tmp_path / "saved"))
  (tmp_path / "saved" / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"saved holds weights and no config\.json"):
    inputs.load_model(str(tmp_path / "saved"))
  larger = RATPlusConfig(2000, 1, 8, 1)  # as a preset that was trained on bytes
  inputs.check_tokenizer(BYTES, larger, {"tokenizer": "bytes"})
  with pytest.raises(ValueError, match="vocab_size=2000 of the model does not fit"):
    inputs.check_tokenizer(BYTES, larger, {})


def test_a_continuation_is_what_it_adds_to_its_prompt(folder, tmp_path):
  """A piece alone loses the space that it begins with; a prompt of so many tokens may end inside a character."""
  text = "The ocean is blue; é 4711 €"
  files = load_tokenizer(folder / "hf"), load_tokenizer(folder / "sp"), pieces_tokenizer(tmp_path / "t.json")
  for one in (BYTES, *files):
    ids = one.encode(text)
    for n in range(len(ids) + 1):
      before, added = one.decode(ids[:n]), one.decode_after(ids[:n], ids[n:])
      assert text.endswith(added)
      assert len(text) - len(added) == len(before.rstrip("\ufffd"))
  at = one.encode("The ocean is")
  assert one.decode(one.encode("The ocean is blue")[len(at):]) == "blue"
  assert one.decode_after(at, one.encode("The ocean is blue")[len(at):]) == " blue"


@pytest.mark.parametrize(("prompt", "new", "added"), [
    (b"caf\xc3", b"\xa9 au lait", "é au lait"), (b"caf\xc3", b"", ""), (b"caf\xc3", b"x", "x"), (b"", b"a", "a"),
    (b"caf", b"\xc3", "\ufffd"), (b"5 \xe2\x82", b"\xac", "€"), (b"5 \xe2", b"\x82", ""),
    (b"\xff", b"\xffa", "\ufffda"),
])
def test_characters_cut_in_the_middle(prompt, new, added):
  assert BYTES.decode_after(list(prompt), list(new)) == added


def test_text_that_later_tokens_change_is_new(tmp_path):
  """This decoder takes one bad byte of several as a sign that all are bad."""
  one = pieces_tokenizer(tmp_path / "t.json")
  lead, prompt = one.encode("€")[1], one.encode("is é")
  assert one.decode([*prompt, lead]) == "is \ufffd\ufffd\ufffd"
  assert one.decode_after(prompt, [lead]) == "\ufffd\ufffd\ufffd"


def test_an_answer_begins_with_the_token_that_holds_its_first_character(folder, tmp_path):
  """Whatever merges across the seam: a space with a word, an end of the prompt with a start of the answer."""
  one = pieces_tokenizer(tmp_path / "t.json", ("▁", "b"), ("1", "2"), ("i", "s"), ("s", ","), (".", "▁"))
  ids = lambda text: one.encode(text)
  token = lambda piece: tokenizers.Tokenizer.from_file(str(tmp_path / "t.json")).token_to_id(piece)
  assert one.encode_after("it is", " blue") == (ids("it is"), [token("▁b"), *map(token, "lue")])
  assert one.encode_after("at 1", "2 a") == ([token("▁"), *map(token, "at▁")], [token("12"), *map(token, "▁a")])
  assert one.encode_after("at.", " a") == ([token("▁"), *map(token, "at")], [token(".▁"), token("a")])
  assert one.encode_after("", "at") == ([], [token("▁"), *map(token, "at")])
  assert one.encode_after("at", "") == (ids("at"), [])
  assert [len(part) for part in one.encode_after("é", "€")] == [3, 3]
  # "is" and "i", "s,": the "i" is the prompt's, though the prompt alone has it in another token
  other = pieces_tokenizer(tmp_path / "other.json", ("s", ","), ("i", "s"))
  assert [len(part) for part in other.encode_after("is", ", a")] == [2, 3]
  assert [len(part) for part in dataclasses.replace(other, encode_spans=None).encode_after("is", ", a")] == [1, 4]


def test_spaces_count_as_characters_of_a_token(tmp_path):
  """Also where the file says that they are no part of what a token holds, as GPT-2's does."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={piece: i for i, piece in enumerate(
      ["</s>", *"is1Ġ", "sĠ"])}, merges=[("s", "Ġ")]))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
  assert made.encode("is 1").offsets == [(0, 1), (1, 2), (3, 4)]
  made.save(str(tmp_path / "tokenizer.json"))
  assert load_tokenizer(tmp_path / "tokenizer.json").encode_after("is", " 1") == ([1], [5, 3])


@given(prompt=st.text("ab 12é€.,;\n"), text=st.text("ab 12é€.,;\n"))
def test_prompt_and_answer_are_encoded_together(folder, prompt, text):
  for one in (BYTES, load_tokenizer(folder / "hf"), load_tokenizer(folder / "sp")):
    before, after = one.encode_after(prompt, text)
    assert before + after == one.encode(prompt + text)
    assert prompt.startswith(one.decode(before).rstrip("\ufffd"))
  assert BYTES.encode_after(prompt, text) == (BYTES.encode(prompt), BYTES.encode(text))
