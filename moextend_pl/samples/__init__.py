"""Text and pictures to tensors, in pure functions: turns, templates, label masks, pixels, collation, packing.

Data workers and models import it, so that a question is encoded as it was learned; it imports `contracts` only.
"""
