"""How a base layer's weight is read, written and restored, for each way of storing it."""
