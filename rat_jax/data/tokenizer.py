"""Tokenizers: bytes, a `tokenizers` JSON, a sentencepiece model, a folder that holds one of these, a GGUF file."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from rat_jax.config import RATPlusConfig
from rat_jax.convert.tensors import read_json
from rat_jax.data.gguf_tokenizer import tokenizer_of
from rat_jax.paths import local_path

_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
_HUB = "hub:"
_PADDING = 1024  # models round their vocabulary up by less than this

Spans = tuple[list[int], list[tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to token ids and back. No id of its own is added to a text, and none is hidden in one.

  Attributes:
    source: what `load_tokenizer` takes; `str` of a tokenizer.
    name: what it is, with a digest of its file: equal names are equal tokenizers.
    vocab_size: the largest id and one.
    eod_id: the id that ends a document or an answer.
    encode_batch: texts -> a list of ids for each. Of "bytes", raises ValueError for a text with NUL, its `eod_id`.
    decode: ids -> text; ids that it does not know are left out.
    encode_spans: a text -> its ids, and of each the first character that it holds and the one after its last. None
      where the library does not say.
    controls: {name: id} of the tokens that no text has, such as those of a chat template.
  """

  source: str
  name: str
  vocab_size: int
  eod_id: int
  encode_batch: Callable[[Sequence[str]], list[list[int]]]
  decode: Callable[[Sequence[int]], str]
  encode_spans: Callable[[str], Spans] | None = None
  controls: Mapping[str, int] = dataclasses.field(default_factory=dict, hash=False)

  def __str__(self) -> str:
    return self.source

  def encode(self, text: str) -> list[int]:
    return self.encode_batch([text])[0]

  def encode_after(self, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """(the prompt's ids, the ids of the text after it): together they are `encode(prompt + text)`.

    A token that holds a character of `text` belongs to it, whatever of the prompt is in that token too. Without
    `encode_spans` the cut is before the first token that the prompt alone does not have, which may be earlier.
    """
    if self.encode_spans is None:
      alone, ids = self.encode_batch([prompt, prompt + text])
      cut = _shared(alone, ids)
    else:
      ids, spans = self.encode_spans(prompt + text)
      cut = next((i for i, (_, end) in enumerate(spans) if end > len(prompt)), len(ids))
    return ids[:cut], ids[cut:]

  def decode_after(self, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """The text that new tokens add to a prompt: a piece alone may lose its first space, or begin inside a character.

    It is the text of all tokens without the longest beginning that the prompt's own text shares with it. So a character
    that the prompt begins and the new tokens complete belongs to the new text, as does all that they change of the
    prompt's text, to its end.
    """
    before, whole = self.decode(prompt_ids), self.decode([*prompt_ids, *new_ids])
    return whole[_shared(before, whole):]

  def check(self, config: RATPlusConfig) -> None:
    """Raises ValueError where a model's vocabulary is not this one, rounded up a little or not."""
    if not 0 <= config.vocab_size - self.vocab_size < _PADDING:
      raise ValueError(f"vocab_size={config.vocab_size} of the model does not fit the tokenizer {self.name} of"
                       f" {self.vocab_size} tokens; use the tokenizer that the model was trained with.")


def _shared(one: Sequence[object], other: Sequence[object]) -> int:
  """How many entries two sequences have in common from their start on."""
  return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _decode_bytes(ids: Sequence[int]) -> str:
  return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")


def _encode_bytes(texts: Sequence[str]) -> list[list[int]]:
  for text in texts:
    at = text.find("\0")
    if at >= 0:
      raise ValueError(f"the text holds NUL as its character {at}, which ends a document of bytes; leave it"
                       " out of the text.")
  return [list(text.encode()) for text in texts]


# NUL ends a document: it is in no text, and a file that holds one is refused as binary.
BYTES = Tokenizer("bytes", "bytes", 256, 0, _encode_bytes, _decode_bytes)


def load_tokenizer(source: str | os.PathLike[str], end: str | None = None) -> Tokenizer:
  """The tokenizer that `source` names.

  Args:
    source: "bytes"; a tokenizer.json of the `tokenizers` package; a sentencepiece .model; a folder with one of them; a
      .gguf file; "hub:NAME", a model on the Hugging Face hub, whose tokenizer files are fetched. All others are local.
    end: the token that ends a document. Default: eos_token of tokenizer_config.json beside the file, sentencepiece's
      or GGUF's own, else the common one that the vocabulary holds.

  Raises:
    FileNotFoundError: no such file. ValueError: a file that is no tokenizer, an unknown end, or one for bytes.
    ImportError: the extra "hf", or "gguf", is not installed.
  """
  if source == "bytes":
    if end is not None:
      raise ValueError(f"end={end!r} of the tokenizer \"bytes\", whose documents end in NUL; leave end out.")
    return BYTES
  if str(source).startswith(_HUB):
    path = _downloaded(str(source).removeprefix(_HUB))
  else:
    path = local_path(source, "tokenizer")
  if path.is_dir():
    inside = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
    if not inside:
      raise FileNotFoundError(f"{path} holds neither tokenizer.json nor tokenizer.model.")
    path = inside[0]
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; give \"bytes\", a file, a folder, or {_HUB}NAME to download one.")
  return {".json": _from_json, ".gguf": _from_gguf}.get(path.suffix, _from_sentencepiece)(path, end)


def _from_json(path: pathlib.Path, end: str | None) -> Tokenizer:
  library = _library("tokenizers")
  try:
    made = library.Tokenizer.from_file(str(path))
  except Exception as error:  # the package raises no narrower type
    raise ValueError(f"{path} is no JSON file of the tokenizers package: {error}") from error
  beside = path.with_name("tokenizer_config.json")
  if end is None and beside.is_file():
    said = read_json(beside, "give an object with eos_token, or name the token that ends a document").get("eos_token")
    end = said.get("content") if isinstance(said, dict) else said
  return _of_library(path, made, end)


def _from_gguf(path: pathlib.Path, end: str | None) -> Tokenizer:
  made, own_end = tokenizer_of(path, _library("tokenizers"))
  return _of_library(path, made, end or own_end)


def _of_library(path: pathlib.Path, made: Any, end: str | None) -> Tokenizer:
  """Of an object of the package `tokenizers`."""
  made.encode_special_tokens = True  # "</s>" in a text is four characters
  made.no_truncation()
  made.no_padding()
  # It has nothing to add without special tokens, but may take spaces out of what a token holds.
  made.post_processor = _library("tokenizers").processors.ByteLevel(trim_offsets=False)
  ids = made.get_vocab(with_added_tokens=True)
  ends = [end] if end is not None else [token for token in _ENDS if token in ids]
  if not ends or ends[0] not in ids:
    raise ValueError(f"{path} has no end-of-document token {end or 'of the common ones'}; name one of its tokens.")
  size = max(ids.values()) + 1

  def encode_spans(text: str) -> Spans:
    one = made.encode(text, add_special_tokens=False)
    return one.ids, one.offsets

  return Tokenizer(str(path), _name(path), size, ids[ends[0]],
                   lambda texts: [one.ids for one in made.encode_batch(list(texts), add_special_tokens=False)],
                   lambda some: made.decode([int(i) for i in some if 0 <= i < size], skip_special_tokens=True),
                   encode_spans, {one.content: i for i, one in made.get_added_tokens_decoder().items() if one.special})


def _from_sentencepiece(path: pathlib.Path, end: str | None) -> Tokenizer:
  library = _library("sentencepiece")
  made = library.SentencePieceProcessor()
  try:
    made.LoadFromSerializedProto(path.read_bytes())
  except RuntimeError as error:
    raise ValueError(f"{path} is no sentencepiece model: {error}") from error
  size = made.vocab_size()
  eod = made.eos_id() if end is None else made.piece_to_id(end)
  if eod < 0 or (end is not None and made.id_to_piece(eod) != end):
    raise ValueError(f"{path} has no end-of-document token {end or 'of its own'}; name one of its tokens.")
  return Tokenizer(str(path), _name(path), size, eod, lambda texts: made.encode(list(texts)),
                   lambda some: made.decode([int(i) for i in some if 0 <= i < size]),
                   controls={made.id_to_piece(i): i for i in range(size) if made.is_control(i)})


def _name(path: pathlib.Path) -> str:
  return f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _downloaded(name: str) -> pathlib.Path:
  hub = _library("huggingface_hub")
  patterns = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
  return pathlib.Path(hub.snapshot_download(name, allow_patterns=patterns))


def _library(name: str) -> ModuleType:
  try:
    return __import__(name)
  except ImportError as error:
    raise ImportError(f"{name} is not installed; pip install -e '.[hf]' in the clone.") from error
