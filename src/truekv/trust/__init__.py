"""Whether: verdicts on combinations, and the measurements behind them."""
