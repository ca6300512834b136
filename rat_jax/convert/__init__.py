"""Conversion of other people's weights to our parameters, and back."""

from rat_jax.convert.added_memory import add_memory
from rat_jax.convert.anyones import check_length, context_length, load
from rat_jax.convert.folders import export, export_olmo2, load_olmo2
from rat_jax.convert.ratplus import from_ratplus_state_dict, load_ratplus, to_ratplus_state_dict

__all__ = ["add_memory", "check_length", "context_length", "export", "export_olmo2", "from_ratplus_state_dict", "load",
           "load_olmo2", "load_ratplus", "to_ratplus_state_dict"]
