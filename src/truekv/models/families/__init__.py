"""One file per family, found by its place in this folder: config fields, tensor names, composition."""
