"""Whose forward it is, who has to wait, and what is on the model while it runs."""
