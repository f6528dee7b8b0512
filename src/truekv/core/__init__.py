"""What: the nouns and the seams of the house. Nothing here computes, allocates or decides."""
