"""Other people's weights in and out."""

from rat_jax.convert.ratplus import from_ratplus_state_dict, to_ratplus_state_dict

__all__ = ["from_ratplus_state_dict", "to_ratplus_state_dict"]
