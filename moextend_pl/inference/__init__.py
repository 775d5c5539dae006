"""Asking a model: how answers are generated, questions with pictures from anywhere, streams, conversations.

Models bring these methods along; it knows routers (`moe`) and `training`, and what it generates with is transformers'.
"""
