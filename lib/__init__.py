"""What the method stands on and any motion project could use. Nothing here imports from the top level."""
