"""Floor 6: the `sps2` command line."""
