"""The modes: what a query may read, chosen per call on the same parameters. One file each."""

from rat_jax.modes import text
from rat_jax.modes.base import Mode, visible
from rat_jax.modes.block_mode import BlockMode
from rat_jax.modes.dense import Dense
from rat_jax.modes.dilated import Dilated
from rat_jax.modes.dilated_topk import DilatedTopK
from rat_jax.modes.moba import MoBA
from rat_jax.modes.per_head import PerHead
from rat_jax.modes.per_layer import PerLayer
from rat_jax.modes.quest import Quest
from rat_jax.modes.selecting import SelectingMode
from rat_jax.modes.snapkv import SnapKV
from rat_jax.modes.streaming_llm import StreamingLLM
from rat_jax.modes.topk import TopK

MODES: dict[str, type[Mode]] = {mode.name: mode for mode in (
    Dense,
    Dilated,
    StreamingLLM,
    Quest,
    MoBA,
    SnapKV,
    DilatedTopK,
    TopK,
    PerLayer,
    PerHead,
)}


def parse_mode(text_form: str | Mode) -> Mode:
  """Reads what `str(mode)` writes: "dense", "dilated:16,window=256,sinks=4", "per_layer:[dense;dilated:8]".

  A union may be written as in code, "streaming_llm:64|quest:1024". A mode is given back as it is.

  Raises ValueError that quotes the text and says what is known.
  """
  if isinstance(text_form, Mode):
    return text_form
  if not isinstance(text_form, str):
    raise ValueError(f"mode {text_form!r} is a {type(text_form).__name__}; give a text such as 'dilated:16', or"
                     " a mode.")
  return text.parse(text_form, MODES)


__all__ = ["MODES", "BlockMode", "Dense", "Dilated", "DilatedTopK", "MoBA", "Mode", "PerHead", "PerLayer", "Quest",
           "SelectingMode", "SnapKV", "StreamingLLM", "TopK", "parse_mode", "visible"]
