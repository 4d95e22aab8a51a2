"""Kernels for GPUs, each with a reference of its signature in ops. Modules in here alone import triton."""

# What a head_dim must be a multiple of, and at most.
HEAD_DIM_STEP, MAX_HEAD_DIM = 8, 256
