"""Floor 3: a Megatron GPT model, its checkpoints and its forward in steps."""
