"""Adapts a trained model to the mode that it will run under: a short training, that mode alone, ARL off.

Command: python -m experiments.adapt --checkpoint=runs/pretrain/checkpoints --mode=dilated:16,window=32,sinks=4
The paper adapts for 1B tokens at a tenth of the pretraining rate (arXiv 2602.18196). Resumes like `pretrain`.
"""

from __future__ import annotations

import pathlib

from absl import flags

from experiments import common, training

CHECKPOINT = common.define_path("checkpoint", "Folder of checkpoints, or of save_pretrained, to start from.",
                                required=True)
DTYPE = common.define_dtype()
MODE = common.define_modes(["dilated:16,window=32,sinks=4"], "The mode to adapt to; several make one update each.")


def main() -> None:
  config, params, notes = training.load(CHECKPOINT.value, DTYPE.value)
  data = training.train_data("adapt")
  common.check_data(data, config, notes)
  training.fit(config, params, MODE.value, data, "adapt",
               start=str(pathlib.Path(CHECKPOINT.value).absolute()))


if __name__ == "__main__":
  flags.set_default(training.LEARNING_RATE, 1e-4)
  flags.set_default(training.WARMUP, 0.0)
  common.run(main)
