"""Other engines on this machine, each in an environment of its own, beside ours. See README.md."""
