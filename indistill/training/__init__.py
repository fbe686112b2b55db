"""Training runs. Imports no torch by itself."""
