"""The teacher's outputs for the student, live or stored. Imports no torch by itself."""
