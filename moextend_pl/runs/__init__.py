"""The files of a run: checkpoint, manifest, fingerprints, atomic writes, lock, and what is settled before a start.

Knows files and tensors, never a model; models, callbacks and commands import it. It imports `contracts` and `samples`.
"""
