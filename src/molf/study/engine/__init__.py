"""Answering a task's requests with a model: batched likelihoods and generations, and the evaluation made of them."""
