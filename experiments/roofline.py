"""What the kernels for TPUs should take: counted from their programs, with a chip's public figures. No TPU is needed.

Claim: a kernel should take little more than what its operation's inputs, results and products take alone.
Commands: python -m experiments.roofline
          python -m experiments.roofline --measured        on a TPU: the time of every case beside its prediction
          python -m experiments.roofline --crossovers      from which sizes on kernels should be as fast as plain JAX
Result: a table of every kernel and chip: milliseconds (times the floor, what bounds it); results.json.
Cost: a minute on any machine; of --crossovers ten, with the tpu extra.
But for --measured, times are predictions. docs/kernels.md says what would break them.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
from absl import flags

from experiments.aot import kernel_cases, predicted_crossovers
from experiments.aot.chips import CHIPS, chip_of_device
from experiments.shared import command, device, output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  crossovers: bool
  measured: bool


def define_flags() -> None:
  command.define_common_flags("roofline")
  flags.DEFINE_bool("crossovers", False, "Instead: the predicted entries of pallas_kernels/crossovers.py.")
  flags.DEFINE_bool("measured", False, "Time every case on this TPU, beside what is predicted.")


def main(settings: Settings) -> None:
  if settings.crossovers:
    settings.refuse(("measured",), "--crossovers measures nothing; leave one of them out.")
    say = functools.partial(print, flush=True)
    entries = [predicted_crossovers.entry(f"{name}:2x2{'x1' * (chip.dimensions > 2)}", say)
               for name, chip in CHIPS.items()]
    print("\n".join(f"{kind!r}: {entry}," for kind, entry in entries))
    return
  here = chip_of_device(jax.devices()[0]) if settings.measured else None
  if settings.measured and here is None:
    raise ValueError(f"--measured on {device.name()}; it times kernels for TPUs, so run it on one of"
                     f" {', '.join(CHIPS)}.")
  folder, cells = output.made(settings.workdir), []
  for case in kernel_cases.CASES:
    print(f"counting: {case.label}", flush=True)
    cells.append(case.counted())
    output.write_json(folder / "results.json", {"cells": cells})
  if here is None:
    print(f"\n{kernel_cases.table(cells)}")
    return
  seconds = {}
  for case in kernel_cases.CASES:
    print(f"timing: {case.label}", flush=True)
    try:
      seconds[case.label] = kernel_cases.timed(case, settings.seed)
      output.write_json(folder / "results.json", {"cells": cells, "seconds": seconds})
    except jax.errors.JaxRuntimeError as error:
      if not device.out_of_memory(error):
        raise
      print(f"not timed: {case.label}: out of memory", flush=True)
  print(f"\n{kernel_cases.measured_table(cells, seconds, here)}")


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
