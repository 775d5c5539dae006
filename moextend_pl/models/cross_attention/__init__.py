"""Gated cross-attention (NVLM-X, arXiv 2409.11402): the language model looks at pictures instead of reading them."""
