"""How processes share the training, agree, and stop. Imports no torch by itself."""
