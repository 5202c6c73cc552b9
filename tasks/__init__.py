"""One unit of work each: read by URL, compute with tda, write whole chunks, return a small receipt."""
