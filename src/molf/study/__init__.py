"""Training runs around the optimizer: configuration, training, evaluation, results and reports."""

import os

# TRL reports every trainer that is made unless told not to, and the hub library reads this once, at its first import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
