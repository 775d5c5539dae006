"""Ablation studies: what a study varies, how its runs are made and resumed, and what comes out."""
