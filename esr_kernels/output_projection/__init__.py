"""From hidden states to stored logits and from d(logits) back: what all ops that start from hidden states share."""
