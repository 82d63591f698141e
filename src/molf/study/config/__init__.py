"""The configuration of a run: dataclasses whose fields are the flags of the command line."""
