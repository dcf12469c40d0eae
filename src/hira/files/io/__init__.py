"""Reading and writing files: safetensors, JSON, folders, the hub, and output folders that are written whole."""
