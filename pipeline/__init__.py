"""From videos to verified latent shards: decode, frames, encoders, shards, commits, executors."""
