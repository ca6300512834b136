"""Arguments of every kind: a result that another reading confirms, or an error that the documentation names.

EXAMPLES=80000 makes an hour of it.
"""

from __future__ import annotations

import json
import string

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import rat_jax
from conftest import OPERATION, WHOLE_MODEL, assert_close, examples
from rat_jax import Dense, Dilated, RATPlusConfig, RATPlusLM, evaluate, parse_mode
from rat_jax.data import BYTES, prepare
from rat_jax.modes import MODES, Mode

often = settings(examples(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
CONFIG = RATPlusConfig(31, 1, 16, 2, init_std=0.3)
MODEL = RATPlusLM(CONFIG)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 6))
INTEGERS = ("uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64")

anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(), st.text(max_size=4),
              st.sampled_from(["head", "kv", "score", "random", "avg", "max", "mean", "gelu", "pre", "bfloat16"]),
              st.integers(0, 9).map(np.int64), st.floats(0, 1).map(np.float32), st.just(Dense()), st.just(Dilated(4))),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple)), max_leaves=4)


def result_of(make, *words):
  """What `make` gives; None where it refuses in a text that holds one of the words."""
  try:
    return make()
  except ValueError as error:
    text = str(error)
  assert any(word in text for word in words), text
  return None


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0), TOKENS)["params"]


@often
@given(cls=st.sampled_from(sorted(MODES.values(), key=str)), arguments=st.lists(anything, max_size=4), data=st.data())
def test_a_mode_of_any_fields_is_written_and_read_or_refused(cls, arguments, data):
  names = [field for field in cls.__dataclass_fields__ if cls.__dataclass_fields__[field].init]
  named = data.draw(st.dictionaries(st.sampled_from(names), anything, max_size=3)) if names else {}
  try:
    mode = cls(*arguments, **named)
  except (ValueError, TypeError):  # TypeError: Python's own, of arguments that are missing or too many
    return
  assert parse_mode(str(mode)) == mode
  assert hash(parse_mode(str(mode))) == hash(mode)


@often
@given(text=st.one_of(
    st.text(max_size=30), st.text(alphabet="abd:,;=|()[] .0123456789e-", max_size=20).map("dilated:".__add__),
    st.lists(st.sampled_from([*MODES, *":,;=|()[]", "16", "0.5", "block", "window", "none", "1e999", "-1"]),
             max_size=12).map("".join)))
def test_any_text_is_a_mode_or_is_refused(text):
  mode = result_of(lambda: parse_mode(text), "mode", "=")
  if mode is not None:
    assert isinstance(mode, Mode)
    assert parse_mode(str(mode)) == mode


@often
@given(changes=st.dictionaries(st.sampled_from(list(RATPlusConfig.__dataclass_fields__)), anything, max_size=4))
def test_a_configuration_of_any_fields_is_written_and_read_or_refused(changes):
  fields = {"vocab_size": 31, "num_layers": 2, "embed_dim": 16, "num_heads": 2} | changes
  config = result_of(lambda: RATPlusConfig(**fields), "=")
  if config is not None:
    assert RATPlusConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(RATPlusConfig(**fields))


@often
@given(text=st.one_of(st.text(max_size=20), st.recursive(st.one_of(st.none(), st.integers(), st.text(max_size=3)),
                                                         lambda x: st.lists(x, max_size=3)).map(json.dumps)))
def test_any_text_is_a_configuration_or_is_refused(text):
  with pytest.raises(ValueError, match="configuration"):
    RATPlusConfig.from_json(text)


def array_of(kind, values):
  """The values in a container of that kind, or None where it has no room for them."""
  if kind == "list":
    return values.tolist()
  low, high = np.iinfo(kind.removeprefix("jax.")).min, np.iinfo(kind.removeprefix("jax.")).max
  if values.min() < low or values.max() > high:
    return None
  made = values.astype(kind.removeprefix("jax."))
  return jax.numpy.asarray(made) if kind.startswith("jax.") else made


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)  # NUL ends documents
kinds = st.sampled_from(["list", *INTEGERS, "jax.int32", "jax.uint8"])
tokens_of = st.lists(st.one_of(st.integers(0, 30), st.integers(0, 30), st.integers(-200, 300)), min_size=12,
                     max_size=12)


@often
@given(kind=kinds, flat=tokens_of, lengths=st.lists(st.integers(-1, 7), min_size=2, max_size=2), length_kind=kinds)
def test_tokens_and_lengths_of_any_type(params, kind, flat, lengths, length_kind):
  values, count = np.reshape(flat, (2, 6)), np.array(lengths)
  tokens, given_lengths = array_of(kind, values), array_of(length_kind, count)
  if tokens is None or given_lengths is None:
    return
  real = np.arange(6) < count[:, None]
  fine = ((count >= 0) & (count <= 6)).all() and ((values[real] >= 0) & (values[real] < 31)).all()
  call = lambda: MODEL.apply({"params": params}, tokens, lengths=given_lengths)
  if not fine:
    with pytest.raises(ValueError, match=r"use 0\.\.6|vocabulary of this model"):
      call()
    return
  plain = np.where(real, values, 0).astype(np.int32)
  expected = MODEL.apply({"params": params}, plain, lengths=count.astype(np.int32))
  assert_close(np.where(real[..., None], call(), 0), np.where(real[..., None], expected, 0), WHOLE_MODEL)


@often
@given(kind=kinds, flat=tokens_of, weights=st.one_of(st.none(), st.lists(st.floats(0, 4, width=32), min_size=12,
                                                                         max_size=12)))
def test_targets_of_any_type(params, kind, flat, weights):
  values = np.where(np.reshape(flat, (2, 6)) < -50, -100, np.reshape(flat, (2, 6)))
  targets = array_of(kind, values)
  if targets is None:
    return
  batch = {"tokens": TOKENS, "targets": targets} | ({} if weights is None else {"weights": np.reshape(weights, (2, 6))})
  counted = values != -100
  weight = np.where(counted, 1.0 if weights is None else np.reshape(weights, (2, 6)), 0.0)
  call = lambda: evaluate.loss_by_mode(MODEL, params, [batch], [Dense()])[Dense()]
  if not ((values[counted] >= 0) & (values[counted] < 31)).all():
    with pytest.raises(ValueError, match="targets run from"):
      call()
  elif not weight.sum():
    with pytest.raises(ValueError, match="no target that counts"):
      call()
  else:
    log_p = jax.nn.log_softmax(MODEL.apply({"params": params}, TOKENS))
    chosen = -np.take_along_axis(np.asarray(log_p), np.where(counted, values, 0)[..., None], 2)[..., 0]
    np.testing.assert_allclose(call(), (chosen * weight).sum() / weight.sum(), rtol=2e-5)


@often
@given(mask=st.lists(st.booleans(), min_size=12, max_size=12), kind=st.sampled_from(["bool", *INTEGERS]))
def test_any_mask_becomes_right_padding(mask, kind):
  real = np.reshape(mask, (2, 6))
  tokens, lengths = rat_jax.to_right_padding(TOKENS, real.astype(kind))
  for row, (made, length) in enumerate(zip(np.asarray(tokens), np.asarray(lengths), strict=True)):
    np.testing.assert_array_equal(made[:length], TOKENS[row][real[row]])
    assert length == real[row].sum()
    assert not made[length:].any()


@often
@given(types=st.lists(st.sampled_from(["float32", "bfloat16", "float16", "int32", "bool"]), min_size=3, max_size=3),
       queries=st.integers(0, 7), keys=st.integers(0, 6), heads=st.integers(0, 4), kv_heads=st.integers(0, 3))
def test_attention_of_arrays_of_any_type_and_shape(types, queries, keys, heads, kv_heads):
  rng = np.random.default_rng(0)
  shapes = ((1, queries, heads, 4), (1, keys, kv_heads, 4), (1, keys, kv_heads, 4))
  q, k, v = (jax.numpy.asarray(rng.standard_normal(shape), kind) for shape, kind in zip(shapes, types, strict=True))
  fine = len(set(types)) == 1 and "float" in types[0] and 0 < queries <= keys and kv_heads and heads and (
      heads % kv_heads == 0)
  if not fine:
    with pytest.raises(ValueError, match=r"have types|have shapes|queries and k"):
      rat_jax.attend(q, k, v, Dense())
    return
  ours = rat_jax.attend(q, k, v, Dense())
  wide = [np.asarray(x, np.float64) for x in (q, k, v)]
  scores = np.einsum("btkgh,bskh->bkgts", wide[0].reshape(1, queries, kv_heads, -1, 4), wide[1]) / 2
  scores[..., np.arange(keys - queries, keys)[:, None] < np.arange(keys)] = -np.inf
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  expected = np.einsum("bkgts,bskh->btkgh", weights / weights.sum(-1, keepdims=True), wide[2]).reshape(ours.shape)
  assert ours.dtype == q.dtype
  assert_close(np.asarray(ours, np.float64), expected, OPERATION if types[0] == "float32" else 2e-2)


@often
@given(prompt=words, text=words, cut=st.integers(0, 40))
def test_texts_come_back_from_their_bytes(prompt, text, cut):
  before, after = BYTES.encode_after(prompt, text)
  assert before + after == BYTES.encode(prompt + text)
  assert BYTES.decode_after(before, after) == BYTES.decode(after)
  ids = BYTES.encode(prompt + text)  # cut anywhere, also inside a character
  whole = BYTES.decode(ids)
  assert whole.endswith(BYTES.decode_after(ids[:cut], ids[cut:]))


@often
@given(texts=st.lists(st.text(alphabet=string.printable + "äöü€𝄞", min_size=1, max_size=400), min_size=1, max_size=3),
       ending=st.sampled_from(["\n", "\r\n", "\r", " ", ""]))
def test_a_prepared_file_holds_its_text(tmp_path, texts, ending):
  text = ending.join(texts)
  source = tmp_path / "text.txt"
  source.write_bytes(text.encode())
  files = result_of(lambda: prepare(source, tmp_path / "data"), "Give more text", "empty")
  if files is None:
    return
  pieces = [BYTES.decode(document) for file in files.values() for document in documents(file.tokens)]
  assert all(piece in text for piece in pieces)
  assert sum(file.sidecar.bytes for file in files.values()) == sum(len(piece.encode()) for piece in pieces)


def documents(tokens):
  """The documents of a file of bytes, without the NUL that ends each."""
  return [part for part in bytes(np.asarray(tokens)).split(b"\0")[:-1]]
