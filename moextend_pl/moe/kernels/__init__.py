"""Triton kernels of gated experts, frozen and new ones in one pass; the numbers are those of a plain loop.

A part of `moe/`: `gated_experts` is what the engine calls, `products` holds the kernels; imports torch, and Triton
only where a kernel starts. `TRITON_INTERPRET=1` runs them on a CPU.
"""
