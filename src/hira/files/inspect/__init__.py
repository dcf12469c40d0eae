"""`hira inspect`: measurements of an adapter's layers, as a table, JSON, a picture and a page."""
