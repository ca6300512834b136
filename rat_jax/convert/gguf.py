"""GGUF files (ggml-org/ggml, docs/gguf.md) to our model: floating types, and what the package `gguf` dequantizes.

Of some families, files of llama.cpp hold the rows of queries and keys in the order of interleaved rotation; these are
put back.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from rat_jax.config import RATPlusConfig
from rat_jax.convert import mapping
from rat_jax.convert.families import Family, family_of, pieces_of
from rat_jax.convert.folders import Leaves, with_memory
from rat_jax.convert.mapping import Piece
from rat_jax.leaves import Spec
from rat_jax.rope import RopeScaling

_NAMES = {"embedding": "token_embd.weight", "head": "output.weight", "final_norm": "output_norm.weight"} | {
    f"layers/{leaf}": f"blk.{{i}}.{name}" for leaf, name in {
        "query": "attn_q.weight", "key": "attn_k.weight", "value": "attn_v.weight", "out": "attn_output.weight",
        "query_bias": "attn_q.bias", "key_bias": "attn_k.bias", "value_bias": "attn_v.bias",
        "query_norm": "attn_q_norm.weight", "key_norm": "attn_k_norm.weight", "attention_norm": "attn_norm.weight",
        "mlp_gate": "ffn_gate.weight", "mlp_in": "ffn_up.weight", "mlp_out": "ffn_down.weight",
        "mlp_norm": "ffn_norm.weight"}.items()}
_POST_NORMS = {"layers/attention_norm": "blk.{i}.post_attention_norm.weight",
               "layers/mlp_norm": "blk.{i}.post_ffw_norm.weight"}
_INTERLEAVED = ("llama", "smollm3")
_FREQUENCIES = "rope_freqs.weight"  # what the frequencies of Llama 3.1 and later are divided by
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def read_gguf(path: pathlib.Path, memory: bool, gate_bias: float) -> tuple[RATPlusConfig, Leaves]:
  """(config, pairs (name, leaf), one after another) of a GGUF file; parameters are float32.

  Raises ValueError for a file that is cut short, a family or setting that is not served, a quantization that the
  package cannot undo, and tensors that do not fit; ImportError without the package.
  """
  file, config = opened(path), gguf_config(path)
  family = family_of(file.said("general.architecture"), str(path))
  pieces = [_of_file(piece, config, family) for piece in pieces_of(config, family)]
  mapping.check(pieces, file, config.num_layers, frozenset({_FREQUENCIES}))
  return with_memory(config, mapping.leaves(pieces, file, config), memory, gate_bias)


def gguf_config(path: pathlib.Path) -> RATPlusConfig:
  """The configuration in a file's header, without a memory. Raises as `read_gguf`."""
  file = opened(path)
  return _config(file, family_of(file.said("general.architecture"), str(path)))


def opened(path: pathlib.Path) -> GGUFFile:
  """The file, as it is now. The last one stays open: reading a header takes seconds, and model, tokenizer and chat
  template lie in one. Raises as `read_gguf`."""
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; give a GGUF file.")
  state = path.stat()
  return _opened(path.absolute(), state.st_mtime_ns, state.st_size)


class GGUFFile:
  """What a file says, and its tensors by name (`tensors.Tensors`), dequantized as they are read."""

  def __init__(self, path: pathlib.Path):
    try:
      import gguf
    except ImportError as error:
      raise ImportError("reading GGUF files needs the package gguf; run pip install -e '.[gguf]'.") from error
    self._path, self._dequantize = path, gguf.quants.dequantize
    try:
      reader = gguf.GGUFReader(path)
      self._tensors = {tensor.name: tensor for tensor in reader.tensors}
      self._fields = reader.fields
    except (ValueError, IndexError, KeyError, OverflowError) as error:
      raise ValueError(f"{path} is no whole GGUF file: {error}; get it again.") from error
    for name, tensor in self._tensors.items():
      try:
        if tensor.tensor_type.name not in _FLOATS:
          self._dequantize(np.zeros_like(tensor.data[:1]), tensor.tensor_type)
      except NotImplementedError as error:
        raise ValueError(f"{path}: {name!r} is {tensor.tensor_type.name}, which the package gguf cannot undo; take"
                         " another quantization, such as Q8_0 or Q4_K_M.") from error

  def said(self, key: str, default: Any = None) -> Any:
    """An entry of the header, or the default."""
    return self._fields[key].contents() if key in self._fields else default

  def needed(self, key: str) -> Any:
    """An entry of the header. Raises ValueError where it has none."""
    if key not in self._fields:
      raise ValueError(f"{self._path} lacks {key!r} in its header; is it a language model's?")
    return self.said(key)

  def specs(self) -> Mapping[str, Spec]:
    return {name: Spec(tuple(int(n) for n in reversed(tensor.shape)), "float32")
            for name, tensor in self._tensors.items()}

  def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
    tensor = self._tensors[name]
    kind = tensor.tensor_type.name
    if kind == "BF16":
      array: np.ndarray = tensor.data[rows].view(jnp.bfloat16)
    elif kind in _FLOATS:
      array = tensor.data[rows]
    else:
      array = self._dequantize(tensor.data[rows], tensor.tensor_type)
    return np.asarray(array, np.float32)


@functools.lru_cache(maxsize=1)
def _opened(path: pathlib.Path, changed: int, size: int) -> GGUFFile:
  return GGUFFile(path)


def _of_file(piece: Piece, config: RATPlusConfig, family: Family) -> Piece:
  """A piece where such a file has it."""
  name = (_POST_NORMS if config.norm_placement == "post" else {}).get(piece.leaf, _NAMES[piece.leaf])
  heads = {"layers/query": config.num_heads, "layers/key": config.num_kv_heads}.get(piece.leaf)
  if heads is None or family.name not in _INTERLEAVED:
    return piece._replace(name=name)

  def to_ours(x: np.ndarray) -> np.ndarray:
    halves = x.reshape(heads, config.head_dim // 2, 2, -1).swapaxes(1, 2)
    return piece.to_ours(halves.reshape(x.shape))

  return piece._replace(name=name, to_ours=to_ours)


def _config(file: GGUFFile, family: Family) -> RATPlusConfig:
  of = f"{family.name}."
  specs = file.specs()
  heads, width = file.needed(of + "attention.head_count"), file.needed(of + "embedding_length")
  head_dim = file.said(of + "attention.key_length", width // heads if isinstance(heads, int) and heads else None)
  for key, value in ((of + "attention.sliding_window", None), (of + "rope.dimension_count", head_dim),
                     (of + "attention.value_length", head_dim), (of + "expert_count", None)):
    said = file.said(key)
    if said not in (None, 0, value):
      raise ValueError(f"{file.said('general.name')}: {key}={said!r} is not supported; {family.shown} here has"
                       f" {'none' if value is None else value}.")
  if not isinstance(heads, int):
    raise ValueError(f"{of}attention.head_count={heads!r} is not supported; all layers have as many heads here.")
  layers = file.needed(of + "block_count")
  base = float(file.said(of + "rope.freq_base", family.rope_base or 10000.0))
  fields: dict[str, Any] = {
      "vocab_size": specs["token_embd.weight"].shape[0] if "token_embd.weight" in specs else 1, "num_layers": layers,
      "embed_dim": width, "num_heads": heads, "num_kv_heads": file.said(of + "attention.head_count_kv", heads),
      "head_dim": head_dim, "mlp_dim": file.needed(of + "feed_forward_length"), "rope_base": base,
      "norm_eps": file.needed(of + "attention.layer_norm_rms_epsilon"), "tie_embeddings": "output.weight" not in specs,
      "rope_scaling": _scaling(file, of, base, head_dim),
      "no_rope_layers": tuple(range(3, layers, 4)) if family.name == "smollm3" else ()}
  return RATPlusConfig(**(family.ours | fields), memory=False)


def _scaling(file: GGUFFile, of: str, base: float, head_dim: int) -> RopeScaling | None:
  kind = file.said(of + "rope.scaling.type", "none")
  if _FREQUENCIES in file.specs():
    return _of_frequencies(file.read(_FREQUENCIES), base, head_dim)
  if kind == "none":
    return None
  if kind not in ("linear", "yarn"):
    raise ValueError(f"{of}rope.scaling.type={kind!r} is not supported; linear and yarn are.")
  factor = file.needed(of + "rope.scaling.factor")
  if kind == "linear":
    return RopeScaling("linear", factor)
  return RopeScaling("yarn", factor, int(file.needed(of + "rope.scaling.original_context_length")))


def _of_frequencies(divisors: np.ndarray, base: float, head_dim: int) -> RopeScaling:
  """The scaling of Llama 3, whose file has what it makes of the frequencies instead."""
  scaling = RopeScaling("llama3", float(divisors.max()), 8192)
  frequencies = base ** (-np.arange(head_dim // 2) / (head_dim // 2))
  if divisors.shape != frequencies.shape or not np.allclose(frequencies / scaling.scaled(frequencies, base), divisors,
                                                            rtol=1e-4):
    raise ValueError(f"{_FREQUENCIES!r} is not that of Llama 3's scaling, which goes from 1 to a factor, here"
                     f" {scaling.factor:g}, over an original length of 8192; other files are not supported.")
  return scaling
