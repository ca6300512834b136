"""RAT+ in JAX: a decaying memory on keys and values, trained densely, run under any sparse attention."""

from pallas_kernels.check import DeviceCheck, check_device
from rat_jax import convert, evaluate
from rat_jax.batch import to_right_padding
from rat_jax.caches.cache import Cache, cache_bytes
from rat_jax.compilation import compiler_options
from rat_jax.config import RATPlusConfig
from rat_jax.costs import tokens_read, training_flops
from rat_jax.decay import memory
from rat_jax.generation import generate, stream
from rat_jax.inference import decode_step, extend, prefill, prefill_many
from rat_jax.inspection import inspect
from rat_jax.model import RATPlusLM
from rat_jax.modes import (
    Dense,
    Dilated,
    DilatedTopK,
    MoBA,
    PerHead,
    PerLayer,
    Quest,
    SnapKV,
    StreamingLLM,
    TopK,
    parse_mode,
    visible,
)
from rat_jax.operators import attend, compress, select
from rat_jax.pretrained import load_pretrained, save_pretrained
from rat_jax.rope import RopeScaling
from rat_jax.selection.choice import Selection
from rat_jax.train import init_train_state, make_optimizer, train_step
from rat_jax.version import __version__

__all__ = [
    "Cache", "Dense", "DeviceCheck", "Dilated", "DilatedTopK", "MoBA", "PerHead", "PerLayer", "Quest",
    "RATPlusConfig", "RATPlusLM", "RopeScaling", "Selection", "SnapKV", "StreamingLLM", "TopK", "__version__",
    "attend", "cache_bytes", "check_device", "compiler_options", "compress", "convert", "decode_step", "evaluate",
    "extend", "generate", "init_train_state", "inspect", "load_pretrained", "make_optimizer", "memory",
    "parse_mode", "prefill", "prefill_many", "save_pretrained", "select", "stream", "to_right_padding", "tokens_read",
    "train_step", "training_flops", "visible",
]
