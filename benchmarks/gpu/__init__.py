"""Kernels, layers and serving on one GPU: right first, then how fast, beside the card's own ceilings."""
