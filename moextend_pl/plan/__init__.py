"""What a stage costs before a weight is there: memory, operations, hours, advice.

Reads a stage as the command line does, on the meta device; nothing imports it.
"""
