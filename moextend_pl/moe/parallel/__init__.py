"""Expert parallelism: the base's experts in parts on several ranks, to which tokens travel and come back."""
