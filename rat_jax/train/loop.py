"""The training loop: batches in, metrics and checkpoints out, and a stop that harms nothing."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rat_jax import checks
from rat_jax.compilation import compiler_options
from rat_jax.costs import PEAK_FLOPS, training_flops
from rat_jax.model import RATPlusLM
from rat_jax.modes import Mode
from rat_jax.parallel import processes
from rat_jax.paths import local_path
from rat_jax.train.checkpoint import Checkpoints, check_notes
from rat_jax.train.loss import as_batch
from rat_jax.train.optimizer import Optimizer
from rat_jax.train.step import ARL, AccumulateBy, Batch, Combine, Metrics, TrainState, train_step
from rat_jax.transformer import Remat

_PRINT_EVERY = 30.0  # seconds between lines where there is no progress bar


def train(model: RATPlusLM, optimizer: Optimizer, state: TrainState, batch_at: Callable[[int], Batch], *, steps: int,
          modes: Sequence[Mode] = ARL, combine: Combine = "sequential", accumulation: int = 1,
          accumulate_by: AccumulateBy = "batch", remat: Remat = "products", unroll: bool = False,
          donate: bool = False, log_every: int = 10,
          metrics_path: pathlib.Path | None = None, checkpoints: Checkpoints | None = None, save_every: int = 0,
          notes: Mapping[str, Any] | None = None, label: str = "train") -> TrainState:
  """Trains from `state.step` up to `steps` batches.

  Args:
    batch_at: the batch of a step; a pure function, so that a resumed run sees the same data.
    accumulate_by, remat, unroll: see `train_step`.
    donate: gives the memory of `state` away, which is then of no use to the caller.
    log_every: every so many batches the losses are fetched, shown and appended to `metrics_path` as JSON lines. The
      "utilisation" of a line is `rat_jax.training_flops` over the chips' peak, null for an unknown chip; "peak_bytes"
      the most memory that a chip has held, null where that is not known.
    checkpoints, save_every: where and how often to save; the last state is saved too.
    notes: what a checkpoint is to say of the run besides its step; plain JSON. `save_every` and `notes` want
      `checkpoints`.
    label: what the progress bar says; where there is no terminal, a line is printed now and then instead.

  Raises:
    ValueError: numbers out of range, a state beyond `steps`, notes that are no JSON, a batch that is none, checkpoints
      of later steps in the folder.
    FloatingPointError: a loss that is not finite. Names the step and the last good checkpoint, which stays.
  """
  for name, value, least in (("steps", steps, 1), ("log_every", log_every, 1), ("save_every", save_every, 0)):
    checks.check_count(name, value, least)
  check_notes(notes or {})
  if checkpoints is None and (save_every or notes):
    raise ValueError(f"save_every={save_every}, notes={notes!r} and no checkpoints; give"
                     " checkpoints=Checkpoints(folder), or leave both out.")
  if int(state.step) > steps:
    raise ValueError(f"steps={steps}, and this state is at step {int(state.step)}; `steps` counts from the start of the"
                     f" training, so use at least {int(state.step)}.")
  step_fn = jax.jit(functools.partial(train_step, model, optimizer, modes=modes, combine=combine,
                                      accumulation=accumulation, accumulate_by=accumulate_by, remat=remat,
                                      unroll=unroll),
                    donate_argnums=0, compiler_options=compiler_options())
  first, flops = int(state.step), 0.0
  later = [step for step in checkpoints.steps() if step > first] if checkpoints is not None else []
  if checkpoints is not None and later:
    raise ValueError(f"{checkpoints.folder} has checkpoints of steps {later}, and this state is at step {first}: they"
                     " would be overwritten. Restore the newest, or use another folder.")
  metrics_path = None if metrics_path is None else local_path(metrics_path, "metrics_path")
  writes = processes.is_first()
  if metrics_path is not None and writes:
    drop_metrics(metrics_path, first)
  if not donate:
    state = jax.tree.map(jax.numpy.array, state)
  pending: list[Metrics] = []
  from tqdm import tqdm  # here, so that who imports the library does not wait for it

  with tqdm(total=steps, initial=first, desc=label, unit="batch", disable=None if writes else True) as bar:
    clock = printed = time.perf_counter()
    for step in range(first, steps):
      batch = as_batch(batch_at(step), model.config.vocab_size)  # values can be seen here, not in what is compiled
      if step == first:
        flops = sum(training_flops(model.config, mode, batch["tokens"].shape[1]) for mode in modes)
        flops *= batch["tokens"].size
      state, metrics = step_fn(state, batch)
      pending.append(metrics)
      saves = checkpoints is not None and ((save_every and (step + 1) % save_every == 0) or step + 1 == steps)
      if (step + 1) % log_every == 0 or step + 1 == steps or saves:
        lines = list(_fetch(pending, step + 1 - len(pending), clock, flops))
        pending = []
        _write(lines, metrics_path if writes else None)
        _check(lines, modes, checkpoints)
        loss, rate = "/".join(f"{x:.3f}" for x in lines[-1]["loss"]), f"{lines[-1]['tokens_per_second']:.0f}"
        bar.update(step + 1 - bar.n)
        bar.set_postfix(loss=loss, tok_s=rate)
        if bar.disable and writes and (step + 1 == steps or time.perf_counter() - printed > _PRINT_EVERY):
          print(f"{label}: {step + 1}/{steps} batches, loss {loss}, {rate} tokens/s", flush=True)
          printed = time.perf_counter()
        if saves and checkpoints is not None:
          checkpoints.save(state, model.config, {**(notes or {}), "step": step + 1})
        clock = time.perf_counter()
  return state


def drop_metrics(path: pathlib.Path, first: int) -> None:
  """Drops the JSON lines of steps from `first` on: a run killed after its last checkpoint writes them again.

  A broken line, as a kill in the middle of a write leaves it, is dropped too, with a warning that says which it was.
  """
  if not path.exists():
    return
  lines = path.read_bytes().splitlines(keepends=True)
  kept = []
  for number, line in enumerate(lines, 1):
    step = _step_of(line)
    if step is None:
      warnings.warn(f"{path}, line {number} is no whole line of JSON, and is dropped: {line[:60]!r}", stacklevel=2)
    elif step < first:
      kept.append(line)
  if len(kept) < len(lines):
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(b"".join(kept))
    os.replace(beside, path)


def _step_of(line: bytes) -> float | None:
  """The step of a line of metrics, -1 where it has none; None of a broken line."""
  try:
    found = json.loads(line) if line.endswith(b"\n") else None
  except ValueError:  # no JSON, or no text
    return None
  step = found.get("step", -1) if isinstance(found, dict) else None
  return step if isinstance(step, (int, float)) else None


def _fetch(pending: list[Metrics], first: int, clock: float, flops: float) -> Iterator[dict[str, Any]]:
  """The metrics of batches since `clock` as JSON; `flops` are the operations of one."""
  chips: set[jax.Device] = pending[0]["loss"].sharding.device_set
  fetched = [jax.tree.map(np.asarray, metrics) for metrics in pending]  # waits for the device
  seconds = time.perf_counter() - clock
  rate = sum(int(metrics["tokens"]) for metrics in fetched) / seconds
  peak = len(chips) * PEAK_FLOPS.get(next(iter(chips)).device_kind, float("nan"))
  own = [chip for chip in chips if chip.process_index == jax.process_index()]
  held = max((chip.memory_stats() or {}).get("peak_bytes_in_use", float("nan")) for chip in own)
  for i, metrics in enumerate(fetched):
    yield {"step": first + i, "loss": metrics["loss"].tolist(), "grad_norm": metrics["grad_norm"].tolist(),
           "learning_rate": float(metrics["learning_rate"]), "tokens": int(metrics["tokens"]),
           "tokens_per_second": rate, "utilisation": flops * len(fetched) / seconds / peak,
           "peak_bytes": held}


def _write(lines: list[dict[str, Any]], path: pathlib.Path | None) -> None:
  if path is not None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
      file.writelines(json.dumps(jax.tree.map(_json_number, line), allow_nan=False) + "\n" for line in lines)


def _json_number(x: float) -> float | None:
  return x if np.isfinite(x) else None  # JSON has no NaN


def _check(lines: list[dict[str, Any]], modes: Sequence[Mode], checkpoints: Checkpoints | None) -> None:
  for line in lines:
    for mode, loss in zip(modes, line["loss"], strict=True):
      if not np.isfinite(loss):
        good = checkpoints.steps() if checkpoints is not None else []
        last = f"the last good checkpoint is step {good[-1]} in {checkpoints.folder}" if good and checkpoints else (
            "there is no checkpoint yet")
        raise FloatingPointError(f"the loss under {mode} is {loss} at step {line['step']}; {last}. Lower the learning"
                                 " rate, or look at the data of that step.")
