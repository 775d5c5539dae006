"""Growth of frozen blocks: new experts, their router rows, calibration, and which tokens reach them.

A part of `moe/`: `growth` is what models call; imports its neighbours and `contracts`.
"""
