"""What a run is made of: dataclasses whose fields are the command line's flags. Nothing here imports torch."""
