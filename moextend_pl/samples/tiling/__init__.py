"""Pictures of any size as tiles of one size with a thumbnail, and the tags that name them (NVLM, arXiv 2409.11402)."""
