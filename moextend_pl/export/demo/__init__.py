"""A web page to talk with a model: beside each answer, which experts it took and what the base alone says."""
