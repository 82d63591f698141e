"""Answers a task's requests with a model, in batches: likelihoods, generations, and the evaluation built on them."""
