"""Converters from other model formats to Megatron checkpoints. Never imports the engine."""
