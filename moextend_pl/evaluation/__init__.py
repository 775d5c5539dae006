"""Measures a model: metrics by published protocols, tasks read from their own files, retention of what it knew.

`metrics/` holds the scores; nothing here is needed to train.
"""
