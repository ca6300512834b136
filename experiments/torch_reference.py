"""Times the RAT+ authors' PyTorch operators, compiled, on the cases of `bench_ops`, which runs this in its own process.

Of a checkout of their code three files are loaded: src/model/op/ascan.py, src/model/op/merge_lastt.py and
src/model/backbone/cache.py. Command: python -m experiments.torch_reference DIR < cases.json
Writes a line of JSON for each case: {"seconds": ...} or {"error": ...}.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

FILES = ("src/model/op/ascan.py", "src/model/op/merge_lastt.py", "src/model/backbone/cache.py")
ROPE_BASE = 10000.0


def check_paths(directory: str) -> None:
  """Raises FileNotFoundError where one of `FILES` is missing."""
  for name in FILES:
    if not (pathlib.Path(directory) / name).is_file():
      raise FileNotFoundError(f"--torch_reference={directory} has no {name}; give a checkout of the RAT+ authors'"
                              " code.")


def load(directory: str) -> list[Any]:
  """The authors' modules, as `ratplus_...`: torch.compile looks functions' modules up by name."""
  modules = []
  for name in FILES:
    path = pathlib.Path(directory) / name
    spec = importlib.util.spec_from_file_location(f"ratplus_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    modules.append(importlib.util.module_from_spec(spec))
    sys.modules[spec.name] = modules[-1]
    spec.loader.exec_module(modules[-1])
  return modules


def build(modules: list[Any], case: dict[str, Any], heads: int, width: int) -> Callable[[], Any]:
  """A compiled call of the case, on random bfloat16 inputs [B, N, T, H]; with gradients of a random cotangent by all.

  A decode step is as their layer's: memory, RoPE, the new row written behind the cache, attention; without the
  bookkeeping that makes the row stay. It reads T/D rows where ours reads T/D + 2, and ours writes none.
  """
  import torch
  import torch.nn.functional as F

  ascan, attention, caches = modules
  b, t, d, w, s0 = (case[name] for name in ("batch", "length", "dilation", "window", "sinks"))

  def draw(tokens):
    return torch.randn(b, heads, tokens, width, device="cuda", dtype=torch.bfloat16)

  def angles(first, count):
    frequency = ROPE_BASE ** (-torch.arange(width // 2, device="cuda", dtype=torch.float32) / (width // 2))
    angle = torch.arange(first, first + count, device="cuda", dtype=torch.float32)[:, None] * frequency
    return torch.cat([angle, angle], dim=-1).cos(), torch.cat([angle, angle], dim=-1).sin()

  def rotate(x, cos, sin):
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-second, first], dim=-1) * sin).to(torch.bfloat16)

  def remember(logits, k, v):
    gate = torch.sigmoid(logits.float()).repeat(1, 1, 1, 2)
    both = ascan.ascan(gate, (1.0 - gate) * torch.cat([k, v], dim=-1))
    return both[..., :width].to(torch.bfloat16), both[..., width:].to(torch.bfloat16)

  def call(f, count):
    compiled, inputs = torch.compile(f), [draw(t).requires_grad_(case["gradient"]) for _ in range(count)]
    if not case["gradient"]:
      return functools.partial(compiled, *inputs)
    outs = lambda: out if isinstance(out := compiled(*inputs), tuple) else (out,)
    cotangents = [torch.randn_like(out) for out in outs()]
    return lambda: torch.autograd.grad(outs(), inputs, cotangents, allow_unused=True)  # dense: no gate

  if case["op"] == "scan":
    return call(remember, 3)
  if case["op"] == "prefill":
    cos, sin = angles(0, t)
    attend = attention.get_eff_attention(width**-0.5, d, w, s0)

    def prefill(logits, q, k, v):
      if d > 1:
        k, v = remember(logits, k, v)
      q, k = rotate(q, cos, sin), rotate(k, cos, sin)
      return attend(q, k, v) if d > 1 else F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call(prefill, 4)

  cos, sin = angles(t - 1, 1)
  if d == 1:
    return functools.partial(torch.compile(F.scaled_dot_product_attention), draw(1), draw(t), draw(t))
  cache = caches.RATPlusSingleLayerCache(0, b, t, s0, w, d, heads, width, heads * width)
  cache.kcache.normal_()
  cache.vcache.normal_()

  def decode(logits, q, k, v):
    gate = torch.sigmoid(logits.float())
    new_k = (gate * cache.lastkcache + (1.0 - gate) * k).to(torch.bfloat16)
    new_v = (gate * cache.lastvcache + (1.0 - gate) * v).to(torch.bfloat16)
    cache.lastkcache.copy_(new_k)
    cache.lastvcache.copy_(new_v)
    keys, values = cache.get_kv_step(t - 1, b, rotate(new_k, cos, sin), new_v)
    return F.scaled_dot_product_attention(rotate(q, cos, sin), keys, values)

  cache.reset_cache()
  cache.update_kv_fake_prefill(t - 2)
  return functools.partial(torch.compile(decode), *(draw(1) for _ in range(4)))


def seconds(run: Callable[[], Any], rounds: int) -> float:
  """The median time of a call on the GPU."""
  import torch

  def timed(calls):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
      run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls

  timed(3)
  calls = max(1, int(0.02 / timed(3)))
  return statistics.median(timed(calls) for _ in range(rounds))


def main() -> None:
  import torch

  modules, asked = load(sys.argv[1]), json.load(sys.stdin)
  for case in asked["cases"]:
    torch.compiler.reset()
    torch.cuda.empty_cache()
    try:
      with torch.set_grad_enabled(case["gradient"]):
        result: dict[str, Any] = {"seconds": seconds(build(modules, case, asked["heads"], asked["head_dim"]),
                                                     asked["rounds"])}
    except Exception as error:  # of one case; the others are still timed
      result = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
