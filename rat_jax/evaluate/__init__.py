"""How good a model is under each mode."""

from rat_jax.evaluate.language_model import loss_by_mode

__all__ = ["loss_by_mode"]
