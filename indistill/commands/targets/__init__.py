"""`indistill targets`: compute the teacher's outputs once, and store them."""
