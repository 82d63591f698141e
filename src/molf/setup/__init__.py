"""From a model and a user's settings to parameter groups: which layers are routed, with which experts."""
