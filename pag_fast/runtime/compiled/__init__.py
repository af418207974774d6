"""``torch.compile`` and recorded graphs of a patched pipeline."""
