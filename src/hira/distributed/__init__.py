"""Base weights that are sharded over processes: how they are sharded, and the product with W' of their parts."""
