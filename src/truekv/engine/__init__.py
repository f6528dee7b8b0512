"""When: in which order tokens enter the model and become real."""
