"""Attention under a rule on positions, and the terms in which every mode and cache is asked for attention."""
