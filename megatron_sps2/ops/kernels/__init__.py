"""Kernels for GPUs, each with a reference of its signature in ops. Modules in here alone import triton."""
