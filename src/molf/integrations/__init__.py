"""MoLF in the Hugging Face libraries: nothing here is needed in a plain PyTorch loop."""
