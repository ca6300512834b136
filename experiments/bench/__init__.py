"""Speed: the cases that are timed, how they are timed, and what they are compared with."""
