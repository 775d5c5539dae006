"""Mixtures of experts: blocks, routers, the engine, 4 bits, usage, layer rules, upcycling; growth in `extension/`.

Works on any tree of modules and knows no stage; imports `contracts` only. Layer rules are named in `moextend_pl`.
"""
