"""What the operations of attention are made of: a softmax over parts of the keys, chunks, rows of a cache."""
