"""Processes forked from one that has imported the libraries once, so that their start costs next to nothing."""

from multiprocessing import get_context

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["molf.study.run.train", "transformers.models.llama.modeling_llama"])
