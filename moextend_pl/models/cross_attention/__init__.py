"""Gated cross-attention (NVLM-X, NVLM-H: arXiv 2409.11402): the language model looks at pictures and reads none."""
