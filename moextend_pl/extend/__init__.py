"""From own data to an extended model by one command: the stage files that it writes, and their run in a row."""
