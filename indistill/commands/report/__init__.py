"""`indistill report`: writes one HTML file about one or several runs."""
