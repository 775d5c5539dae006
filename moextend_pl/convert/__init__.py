"""Published checkpoints of CuMo and MoExtend, read and written exactly; dense models assembled.

Uses models for shapes and runs for files; found by the command line by name.
"""
