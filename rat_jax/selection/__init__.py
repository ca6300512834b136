"""What the modes that choose keys by the query share: summaries of blocks, scores, the choice, attention to it."""
