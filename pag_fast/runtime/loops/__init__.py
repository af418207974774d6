"""What the loop around a denoiser shows of itself, as far as nobody has described it."""
