"""Token mixers: the part of a layer that remembers."""
