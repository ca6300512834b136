"""Adapts a trained model to the mode that it will run under: a short training, that mode alone, ARL off.

Claim: a window that the model was not trained for helps after a short training under it (arXiv 2602.18196, which takes
1B tokens at a tenth of the pretraining rate).
Command: python -m experiments.adapt --checkpoint=runs/pretrain/checkpoints --mode=dilated:16,window=32,sinks=4
Result: not measured on text. On needles, RAT+ at D=8 answers 83.5% before 1000 updates and 98.0% after (sft_niah).
Cost: that of `pretrain` for as many steps. Resumes like `pretrain`.
"""

from __future__ import annotations

import dataclasses
import pathlib

from experiments.shared import command, inputs, training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(training.Settings):
  checkpoint: pathlib.Path
  dtype: str | None


def define_flags() -> None:
  command.define_common_flags("adapt")
  training.define_flags(learning_rate=1e-4, warmup=0.0)
  command.define_path("checkpoint", "Folder of checkpoints, or of save_pretrained, to start from.", required=True)
  command.define_dtype()
  command.define_modes(["dilated:16,window=32,sinks=4"], "The mode to adapt to; repeat it for one update each.")


def main(settings: Settings) -> None:
  mesh = settings.made_mesh()
  config, params, notes = training.load(settings.checkpoint, settings.dtype, mesh)
  data = training.train_data(settings)
  inputs.check_data(data, config, notes)
  training.fit(settings, config, params, data, "adapt", mesh, start=settings.checkpoint)


if __name__ == "__main__":
  command.run(main, Settings, define_flags)
