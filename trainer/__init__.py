"""The trainer: cached latents in, a trained video transformer out; never imports Ray or a video decoder."""
