"""Floor 1: pure tensor functions. No group, no config."""
