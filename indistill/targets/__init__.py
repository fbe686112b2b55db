"""What the teacher computes for the student, live or stored. Imports no torch by itself."""
