"""A run in the forms that other tools take: a folder that transformers loads, a small delta to share, a server.

Uses models and runs; found by the command line by name, and by `import moextend_pl` when transformers asks for it.
"""
