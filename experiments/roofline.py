"""What the kernels for TPUs should take: counted from their programs, with a chip's public figures. No TPU is needed.

Claim: a kernel should take little more than what its operation's inputs, results and products take alone.
Command: python -m experiments.roofline
Result: a table of every kernel and chip: milliseconds (times the floor, what bounds it); results.json.
Cost: two minutes on any machine.
Nothing is measured: times are predictions. docs/kernels.md says what would break them.
"""

from __future__ import annotations

import dataclasses

from experiments.aot import kernel_cases
from experiments.shared import command, output


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(command.Settings):
  pass


def define_flags() -> None:
  command.define_common_flags("roofline")


def main(settings: Settings) -> None:
  folder, cells = output.made(settings.workdir), []
  for case in kernel_cases.CASES:
    print(f"counting: {case.label}", flush=True)
    cells.append(case.counted())
    output.write_json(folder / "results.json", {"cells": cells})
  print(f"\n{kernel_cases.table(cells)}")


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
