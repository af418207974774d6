"""Calls of several processes: which branches, tokens and heads are this one's."""
