"""A run behind transformers' own OpenAI-compatible server.

`command` needs nothing beside the package; `server` is imported where the extra `serve` is installed.
"""
