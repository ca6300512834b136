"""What decoding keeps of tokens: one file for each kind of cache of a run of layers, and the cache of a model."""
