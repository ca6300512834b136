"""Needles in a haystack: models of several seeds, questions, the rows of tables, and what is made of the answers."""
