"""`python -m moextend_pl plan`: what a stage will need and cost, without its weights."""
