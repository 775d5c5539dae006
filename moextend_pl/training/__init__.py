"""What learning needs: the stage module, losses, optimizers, precision, activation checkpointing, termination.

Models import it; it knows experts (`moe`) and files (`runs`), but no tower and no language model.
"""
