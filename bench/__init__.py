"""How fast truekv is: against the machine's memory, and against other engines on the same checkpoints."""
