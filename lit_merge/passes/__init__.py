"""One pass over the training examples, on every rank: each example once, none twice."""
