"""The command line and the Python API. Imports no torch by itself."""
