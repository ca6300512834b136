"""Times the RAT+ authors' PyTorch operators, or model, compiled, on the cases of `bench_ops` and `bench_model`, which
run this in its own process.

Of a checkout of their code, for operators, three files are loaded: src/model/op/ascan.py, src/model/op/merge_lastt.py
and src/model/backbone/cache.py; for the model the package src/model. Command:
python -m experiments.bench.torch_reference DIR < cases.json
Writes a line of JSON for each case: {"seconds": ...} or {"error": ...}.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import pathlib
import statistics
import subprocess
import sys
import types
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


def ask(directory: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
  """What this script answers for each of the asked "cases", in a process that has the device to itself.

  Raises FileNotFoundError as `check_paths`, and ValueError where the process fails, which says itself why.
  """
  check_paths(directory)
  done = subprocess.run([sys.executable, "-m", "experiments.bench.torch_reference", directory],
                        input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=False)
  if done.returncode:
    raise ValueError(f"--torch_reference={directory}: the authors' code ended with {done.returncode}, for the reason"
                     " above; mend that, or leave the flag out to time ours alone.")
  return [json.loads(line) for line in done.stdout.splitlines()]


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
    cos, sin = _angles(width, 0, t)
    attend = attention.get_eff_attention(width**-0.5, d, w, s0)

    def prefill(logits, q, k, v):
      if d > 1:
        k, v = remember(logits, k, v)
      q, k = rotate(q, cos, sin), rotate(k, cos, sin)
      return attend(q, k, v) if d > 1 else F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return call(prefill, 4)

  cos, sin = _angles(width, t - 1, 1)
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


def _angles(width: int, first: int, count: int) -> tuple[Any, Any]:
  """Cosine and sine of the rotation of `count` tokens from position `first` on."""
  import torch

  frequency = ROPE_BASE ** (-torch.arange(width // 2, device="cuda", dtype=torch.float32) / (width // 2))
  angle = torch.arange(first, first + count, device="cuda", dtype=torch.float32)[:, None] * frequency
  return torch.cat([angle, angle], dim=-1).cos(), torch.cat([angle, angle], dim=-1).sin()


def load_model(directory: str) -> types.ModuleType:
  """The authors' package `src.model`. What it imports for other ends (configuration files) may be absent."""
  absent = {"hydra": (), "omegaconf": ("ListConfig", "DictConfig"), "einops": ("rearrange", "repeat")}
  for name, parts in absent.items():
    if importlib.util.find_spec(name) is None:
      sys.modules[name] = types.ModuleType(name)
      vars(sys.modules[name]).update(dict.fromkeys(parts))
  sys.dont_write_bytecode = True  # the checkout stays as it is
  sys.path.insert(0, directory)
  return importlib.import_module("src.model")


def build_model(theirs: types.ModuleType, size: dict[str, Any], case: dict[str, Any], device: str = "cuda") -> Any:
  """The authors' model of a size (fields of RATPlusConfig), for the pattern of a case; `step` is that of decoding."""
  from torch import nn

  of = {"d_model": size["embed_dim"], "init": {"_name_": "fixed", "initializer_range": 0.02}}
  rope = {"_name_": "rope", "dim": size["head_dim"], "max_seq_len": case["context"] + 1, "base": size["rope_base"]}
  attention = {"_name_": "ratplus", "d_model": size["embed_dim"], "num_head": size["num_heads"],
               "apply_re": size["memory"], "dilation_size": case["dilation"], "local_size": case["window"],
               "initial_size": case["sinks"], "joint_train": True}
  mlp = {"_name_": "ffn", "d_model": size["embed_dim"], "d_ffn": size["mlp_dim"], "bias": False, "ln": "rmsnorm"}

  class Model(nn.Module):

    def __init__(self):
      super().__init__()
      self.embedding = theirs.embedding.LMEmbedding(size["vocab_size"], seq_len=case["context"], pe=rope, device=device,
                                                    **of)
      self.backbone = theirs.sequence.SequenceBackbone(size["num_layers"], seq_cell=attention, hidden_cell=mlp,
                                                       ln="rmsnorm", device=device, **of)
      self.head = theirs.head.LMHead(size["vocab_size"], device=device, **of)
      if size["tie_embeddings"]:
        self.head.lm_head.weight = self.embedding.wte.weight

    def forward(self, tokens, **how):
      x, angles = self.embedding(tokens)
      return self.head(self.backbone(x, **how, **angles))

    def step(self, tokens, position, caches):
      x, angles = self.embedding.step(tokens, position)
      return self.head.step(self.backbone.step(x, caches, seq_pos=position, **angles))

  return Model().to(device)


def training(model: Any, size: dict[str, Any], case: dict[str, Any]) -> Callable[[], Any]:
  """A batch of training, two clipped updates: a sparse and a dense one, or of a dense case two dense ones."""
  import torch
  import torch.nn.functional as F

  compiled, parameters = torch.compile(model.train()), list(model.parameters())
  optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
  tokens = torch.randint(size["vocab_size"], (case["batch_size"], case["context"]), device="cuda")
  loss = torch.compile(lambda logits: F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens.view(-1)))

  def update(mode):
    with torch.amp.autocast("cuda", dtype=torch.bfloat16):
      logits = compiled(tokens, mode=mode).float()
    loss(logits).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()

  return lambda: [update(mode) for mode in ("dense" if case["dilation"] == 1 else "sparse", "dense")]


def decoding(model: Any, size: dict[str, Any], case: dict[str, Any], device: str = "cuda") -> list[Callable[[], Any]]:
  """A decode step after `context` tokens, on caches of random numbers, as their benchmark runs it and compiled."""
  import torch

  model, cache_of = model.to(torch.bfloat16).eval(), sys.modules["src.model.backbone.cache"].RATPlusSingleLayerCache
  layers = [cache_of(i, case["batch_size"], case["context"] + 1, case["sinks"], case["window"], case["dilation"],
                     size["num_heads"], size["head_dim"], size["embed_dim"], device=device)
            for i in range(size["num_layers"])]
  for cache in layers:
    cache.kcache.normal_()
    cache.vcache.normal_()
  tokens = torch.randint(size["vocab_size"], (case["batch_size"], 1), device=device)

  def again(step):
    for cache in layers:  # every step is the first one after the context
      cache.update_kv_fake_prefill(case["context"] - 1)
    with torch.amp.autocast("cuda", dtype=torch.bfloat16):
      return step(tokens, case["context"], layers)

  return [functools.partial(again, step) for step in (model.step, torch.compile(model.step))]


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


def answer(modules: Any, asked: dict[str, Any], case: dict[str, Any]) -> float:
  """The seconds of a case: of several ways to do it, the fastest one's."""
  if "model" not in asked:
    calls = [build(modules, case, asked["heads"], asked["head_dim"])]
  else:
    size, model = asked["model"], build_model(modules, asked["model"], case)
    calls = [training(model, size, case)] if case["gradient"] else decoding(model, size, case)
  return min(seconds(call, asked["rounds"]) for call in calls)


def main() -> None:
  import torch

  asked = json.load(sys.stdin)
  modules = (load_model if "model" in asked else load)(sys.argv[1])
  for case in asked["cases"]:
    torch.compiler.reset()
    torch.cuda.empty_cache()
    try:
      with torch.set_grad_enabled(case["gradient"]):
        result: dict[str, Any] = {"seconds": answer(modules, asked, case)}
    except Exception as error:  # of one case; the others are still timed
      result = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
