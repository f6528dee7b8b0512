"""The five failures, executed: what the naive method does, and what truekv does instead."""
