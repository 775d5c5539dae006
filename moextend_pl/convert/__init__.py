"""Published checkpoints of CuMo and MoExtend, to this project's files and back."""
