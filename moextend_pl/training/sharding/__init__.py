"""FSDP2: the decoder layers of a language model in parts on several ranks, all the rest whole on each of them."""
