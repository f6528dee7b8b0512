"""Training, rescaling and evaluation of the small models shipped with truekv."""
