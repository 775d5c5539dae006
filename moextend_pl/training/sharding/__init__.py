"""The decoder layers of a language model (FSDP2), or its experts, in parts on several ranks; all else is whole."""
