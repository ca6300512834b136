"""How good a model is under each mode: held-out loss, needles, scores of answers."""

from rat_jax.evaluate import mini_niah, text_niah
from rat_jax.evaluate.language_model import loss_by_mode
from rat_jax.evaluate.ruler import Example, load_ruler
from rat_jax.evaluate.scores import comma_recall, exact_match, string_match_all, string_match_part

__all__ = ["Example", "comma_recall", "exact_match", "load_ruler", "loss_by_mode", "mini_niah", "string_match_all",
           "string_match_part", "text_niah"]
