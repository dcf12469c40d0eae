"""What surrounds an adapter while it is trained."""
