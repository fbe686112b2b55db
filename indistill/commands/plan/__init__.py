"""`indistill plan`: estimates a run's time, memory and traffic before it starts."""
