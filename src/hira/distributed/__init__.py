"""Base weights that are spread over processes: which way they are, and the product with W' there."""
