"""Triton kernels, each beside a reference of the same signature in ops. Only modules in here import triton."""
