"""Latent caches of other trainers in, a dataset out: a file per format, `story.py` tells the whole."""
