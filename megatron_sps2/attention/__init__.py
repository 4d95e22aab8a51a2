"""Floor 2: attention over a sequence that is spread over sp ranks, and its KV cache."""
