"""How conversations and pictures become tensors: pure functions, shared by data workers and by `generate`."""
