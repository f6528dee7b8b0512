"""In what shape a row is stored: pure codecs, one file each, found by their place in this folder."""
