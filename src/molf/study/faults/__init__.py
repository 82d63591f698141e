"""What keeps a run from being lost: stop signals, locks, and the record of a finished training."""
