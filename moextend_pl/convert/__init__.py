"""Published checkpoints of CuMo and MoExtend, read and written exactly.

Uses models for shapes and runs for files; found by the command line by name.
"""
