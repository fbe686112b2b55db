"""`indistill doctor`: checks whether a run will work on this node or these ranks."""
