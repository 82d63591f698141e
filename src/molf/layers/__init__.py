"""One routed layer and its experts: merged into the weight, or as adapter branches in the model."""
