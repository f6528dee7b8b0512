"""Proposers: each guesses the next tokens, and can be wrong but never harmful."""
