"""What any motion project could use. Nothing here imports from the top level."""
