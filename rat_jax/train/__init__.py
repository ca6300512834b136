"""Training: the loss, the optimizer, the step, the loop, checkpoints."""

from rat_jax.train.checkpoint import Checkpoints
from rat_jax.train.loop import drop_metrics, train
from rat_jax.train.loss import IGNORED, cross_entropy
from rat_jax.train.optimizer import Optimizer, make_optimizer
from rat_jax.train.step import ARL, TrainState, init_train_state, train_step

__all__ = ["ARL", "IGNORED", "Checkpoints", "Optimizer", "TrainState", "cross_entropy", "drop_metrics",
           "init_train_state", "make_optimizer", "train", "train_step"]
