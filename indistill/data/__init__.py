"""From tar files to batches. Imports no torch by itself."""
